"""Folders of transformers: config.json and weights in one file or in shards."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PICKLE = "pytorch_model.bin"


def find(name: str, *, allow_pickle: bool) -> Path:
    """The folder name, or the snapshot of the repository name on the Hugging Face hub."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise FileNotFoundError(f"from_pretrained: expected a folder with {CONFIG}; there is no {name}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"from_pretrained: {name} is no folder here, and the hub needs huggingface_hub: "
            "pip install 'lmkern[hf]'"
        ) from error
    patterns = ["*.json", "*.safetensors", *(["pytorch_model*.bin"] if allow_pickle else [])]
    return Path(snapshot_download(name, allow_patterns=patterns))


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"from_pretrained: expected {path}; there is no such file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"from_pretrained: {path} is not JSON ({error}). Take another copy") from error
    if not isinstance(values, dict):
        raise ValueError(f"from_pretrained: {path} must be a JSON object; got {type(values).__name__}")
    return values


def read_tensors(folder: Path, *, allow_pickle: bool) -> dict[str, Tensor]:
    """All tensors of a folder, on the CPU. Safetensors where there are any; pickle if it is allowed."""
    for name in (WEIGHTS, PICKLE) if allow_pickle else (WEIGHTS,):
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read(folder, sorted(set(_shards(index))))
        if (folder / name).is_file():
            return _read(folder, [name])
    if any((folder / name).is_file() for name in (PICKLE, f"{PICKLE}.index.json")):
        raise ValueError(
            f"from_pretrained: {folder} has {PICKLE} and no {WEIGHTS}; a pickle can hold more than tensors. "
            "Take safetensors, or, if you trust its source, give allow_pickle=True"
        )
    raise FileNotFoundError(
        f"from_pretrained: expected {folder / WEIGHTS} or its shards beside {WEIGHTS}.index.json; "
        "there is no such file. Pickle is looked for with allow_pickle=True alone"
    )


def _shards(index: Path) -> Iterable[str]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in shards.values()
    ):
        raise ValueError(f"from_pretrained: weight_map of {index} must name files beside it")
    return shards.values()


def _read(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"from_pretrained: expected the shard {path}; there is no such file")
        tensors |= _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    return tensors


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"from_pretrained: {path} is no whole safetensors file ({error}). Take another copy"
        ) from error


def _pickled(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    # A file that is no pickle raises whatever its bytes lead to.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"from_pretrained: expected {path} to be a whole pickle of tensors alone; "
            f"got {type(error).__name__}: {reason} Take safetensors or another copy"
        ) from error
    values = found.values() if isinstance(found, dict) else [found]
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in values):
        kinds = {type(x).__name__ for x in values}
        raise ValueError(
            f"from_pretrained: {path} must hold names and tensors; got {', '.join(sorted(kinds))}. "
            "Save model.state_dict() alone"
        )
    return found
