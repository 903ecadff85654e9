"""Models on disk: a folder with model.safetensors and config.json."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
import torch

from lmkern.files import checksum, damage, replacing, save_tensors
from lmkern.models.bert import Bert, BertConfig
from lmkern.models.gpt import GPT, GPTConfig
from lmkern.models.llama import Llama, LlamaConfig
from lmkern.models.t5 import T5, T5Config
from lmkern.models.tensors import check_tensors, fill
from lmkern.models.transformer import Transformer, TransformerConfig

FORMAT = "lmkern-model"
VERSION = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"

Model = Bert | GPT | Llama | T5 | Transformer

_ARCHITECTURES: Mapping[str, tuple[Callable[..., Model], Callable[..., Any]]] = MappingProxyType(
    {
        "Bert": (Bert, BertConfig),
        "GPT": (GPT, GPTConfig),
        "Llama": (Llama, LlamaConfig),
        "T5": (T5, T5Config),
        "Transformer": (Transformer, TransformerConfig),
    }
)
_NAMES = f"{', '.join(sorted(_ARCHITECTURES)[:-1])} or {max(_ARCHITECTURES)}"


def save(model: Model, folder: str | os.PathLike[str], *, beside: Sequence[Path] = ()) -> None:
    """Writes model.safetensors and config.json into folder, which is made if need be; its other files stay.

    beside: files to copy into the folder under their own names, such as the tokenizer's.

    All are written in full beside their places before any takes its place, config.json last: it carries the
    size and SHA-256 of the others, so that no mixture of old and new loads. Raises TypeError for another kind
    of model, ValueError for one with other tensors than its configuration makes: load has no place for them.
    """
    architecture = type(model).__name__
    if architecture not in _ARCHITECTURES:
        raise TypeError(f"save: expected an lmkern {_NAMES}; got {architecture}")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        expected = _make(architecture, model.config).state_dict().keys()
    if changed := sorted(tensors.keys() ^ expected):
        raise ValueError(
            f"save: expected the tensors that {architecture}'s configuration makes; got others: "
            f"{', '.join(changed[:4])}{' ...' if len(changed) > 4 else ''}. Undo what changed the model "
            "(merge an adapter, make a pruned or parametrized weight permanent, tie the head again), or keep "
            "its state_dict with torch.save"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = (WEIGHTS, *(path.name for path in beside))
    with replacing(*(folder / name for name in (*names, CONFIG))) as (weights, *copies, config):
        save_tensors(tensors, weights)
        for path, copy in zip(beside, copies, strict=True):
            shutil.copyfile(path, copy)
        description = {
            "format": FORMAT,
            "version": VERSION,
            "architecture": architecture,
            "config": dataclasses.asdict(model.config),
            "files": {name: checksum(part) for name, part in zip(names, (weights, *copies), strict=True)},
        }
        config.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load(folder: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Model:
    """The model that save wrote, in evaluation mode, in the dtype it was saved in, on device.

    Nothing is returned before every saved file is checked, and torch's random state is not touched. Raises
    FileNotFoundError for a missing folder or file; ValueError, naming file and checksums, for a file that is
    not what was saved, for another format or version, and for weights that do not fit the configuration.
    """
    folder = Path(folder)
    _check_there(folder / CONFIG)
    description = _read_description(folder / CONFIG)
    for name, expected in description["files"].items():
        _check_there(folder / name)
        if found := damage(folder / name, expected):
            raise ValueError(f"load: {found}. Take another copy")
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    # Building draws initial values: the caller's random numbers must not depend on that.
    with torch.random.fork_rng(devices=[]):
        model = _build(folder / CONFIG, description["architecture"], description["config"])
    check_tensors(
        "load",
        folder / WEIGHTS,
        model.state_dict(),
        tensors,
        f"It and {CONFIG} are of different models: take both from one save",
    )
    fill(model, tensors)
    return model.to(device).eval()


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"load: expected {path}; there is no such file. "
            "Give the folder that save wrote (in a run, model/)"
        )


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"load: {path} is not JSON ({error}). It was cut short or altered: save again"
        ) from error
    found = description.get("format") if isinstance(description, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"load: {path} must have format {FORMAT!r}; got {found!r}. It is no model that save wrote"
        )
    if description.get("version") != VERSION:
        raise ValueError(
            f"load: {path} must have version {VERSION}; got {description.get('version')!r}. "
            "It was written by another version of lmkern: load it there"
        )
    expected = {"architecture": str, "config": dict, "files": dict}
    if wrong := [name for name, kind in expected.items() if not isinstance(description.get(name), kind)]:
        raise ValueError(f"load: {path} lacks {', '.join(wrong)}. It was altered: save again")
    if WEIGHTS not in description["files"]:
        raise ValueError(f"load: {path} lacks the checksum of {WEIGHTS}. It was altered: save again")
    return description  # type: ignore[no-any-return]


def _build(path: Path, architecture: str, config: dict[str, Any]) -> Model:
    if architecture not in _ARCHITECTURES:
        raise ValueError(f"load: {path}: architecture must be {_NAMES}; got {architecture!r}")
    _, configuration = _ARCHITECTURES[architecture]
    try:
        checked = configuration(**config)
    except TypeError as error:
        raise ValueError(f"load: {path}: config does not describe a {architecture}: {error}") from error
    return _make(architecture, checked)


def _make(architecture: str, config: Any) -> Model:
    model, _ = _ARCHITECTURES[architecture]
    return model(**dataclasses.asdict(config)) if model is Transformer else model(config)
