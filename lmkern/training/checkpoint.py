"""Checkpoints: a folder of safetensors files and a state.json, complete or not there at all.

    step-00000100/model.safetensors ...   tensors, one file a group
    step-00000100/state.json              format, version, the caller's state, size and SHA-256 of each file,
                                          and the SHA-256 of all that

A checkpoint is written into `.part-step-00000100`, flushed, and renamed; state.json is the last file written.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from lmkern.files import checksum, damage, flush_to_disk, known_as, save_tensors, write_text

FORMAT = "lmkern-checkpoint"
VERSION = 1
PART = ".part-"


@dataclass(frozen=True)
class Checkpoint:
    """What save_checkpoint was given: tensors by group, and the JSON-able state."""

    step: int
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Write folder/step-XXXXXXXX and return its path; then remove all but the newest `keep` checkpoints.

    tensors: group -> name -> tensor, one file a group. state: what JSON can hold. A failure on the way (a
    full disk, a kill) leaves the earlier checkpoints as they were. An intact checkpoint of the same step is
    left and not written again: a step's state is a function of the run's configuration.
    """
    target = folder / f"step-{step:08d}"
    if target.exists():
        try:
            load_checkpoint(target)
            return target
        except ValueError:
            shutil.rmtree(target)
    part = folder / f"{PART}{target.name}"
    remove_unfinished(folder)
    part.mkdir(parents=True)
    try:
        with known_as({part: target}):
            files = {}
            for group, named in tensors.items():
                path = part / f"{group}.safetensors"
                contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
                save_tensors(contiguous, path, {"format": FORMAT, "version": str(VERSION)})
                flush_to_disk(path)
                files[path.name] = checksum(path)
            content = {"format": FORMAT, "version": VERSION, "step": step, **state, "files": files}
            content["sha256"] = _sha256_of_state(content)
            write_text(part / "state.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
            part.rename(target)
            flush_to_disk(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    for old in list_checkpoints(folder)[:-keep]:
        # Renamed first: a kill in the middle of the removal must not leave half a checkpoint under a whole
        # one's name.
        shutil.rmtree(old.rename(folder / f"{PART}{old.name}"))
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; unfinished ones are not among them."""
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))
    return sorted(found, key=_step_of)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed save left half-written."""
    for path in folder.glob(f"{PART}*"):
        shutil.rmtree(path)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after checking every byte of it. Tensors are on the CPU.

    Raises FileNotFoundError if there is no such folder, and ValueError for another format or version and for
    a file that is missing, truncated or altered: it is named with the checksum it should have and the one it
    has, and the checkpoint to go back to.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"load_checkpoint: expected a checkpoint folder; there is none at {path}")
    state = _read_state(path)
    tensors = {}
    for name, expected in state["files"].items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"load_checkpoint: {file} is missing. {_remedy(path)}")
        if found := damage(file, expected):
            raise ValueError(f"load_checkpoint: {found}. {_remedy(path)}")
        tensors[file.stem] = load_file(file)
    return Checkpoint(state["step"], state, tensors)


def _read_state(path: Path) -> dict[str, Any]:
    file = path / "state.json"
    if not file.is_file():
        raise ValueError(f"load_checkpoint: {file} is missing. {_remedy(path)}")
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        found = (state["format"], state["version"])
        expected, computed = state.pop("sha256"), _sha256_of_state(state)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"load_checkpoint: {file} is truncated or altered: it holds no readable state "
            f"(SHA-256 {checksum(file)['sha256']}). {_remedy(path)}"
        ) from error
    if found != (FORMAT, VERSION):
        raise ValueError(
            f"load_checkpoint: {file} must be {FORMAT} version {VERSION}; got {found[0]} version {found[1]}: "
            "read it with the lmkern that wrote it"
        )
    if expected != computed:
        raise ValueError(
            f"load_checkpoint: {file} is altered: its content should have SHA-256 {expected} "
            f"and has {computed}. {_remedy(path)}"
        )
    return dict(state)


def _sha256_of_state(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _remedy(path: Path) -> str:
    before = [other for other in list_checkpoints(path.parent) if _step_of(other) < _step_of(path)]
    if before:
        return f"Remove {path} and resume: the checkpoint before it is {before[-1].name}"
    return "There is no checkpoint before it: start again with --overwrite"
