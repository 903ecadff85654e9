"""A training run as its folder holds it."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from lmkern.data.shards import MANIFEST, REMOVED
from lmkern.models.io import WEIGHTS
from lmkern.training.run_folder import (
    ABOUT,
    CONFIG,
    DATA,
    EVALUATION,
    FORMAT,
    METRICS,
    MODEL,
    SAMPLES,
    TIMINGS,
    VERSION,
    other_data,
)

# Sources that are named of what one thing befell; the others are counted.
NAMED = 3


@dataclass(frozen=True)
class Removed:
    """What the preparation of the corpus removed for one reason."""

    pieces: int = 0
    bytes: int = 0
    sources: tuple[str, ...] = ()
    """Of the first pieces, at most NAMED."""

    def names(self, show: Callable[[str], str] = str) -> str:
        """The first sources and how many more there are: "a.png, b.zip, c.gif and 4 more"."""
        return first_names(self.sources, self.pieces, show)


def first_names(names: Sequence[str], count: int, show: Callable[[str], str] = str) -> str:
    """The first NAMED of count names, and how many more there are."""
    shown = [show(name) for name in names[:NAMED]]
    more = count - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")


def encodings(manifest: Mapping[str, Any], show: Callable[[str], str] = str) -> str:
    """The files that were read as something else than UTF-8: "latin-1: a.txt, b.txt; utf-16: c.txt"."""
    found: Mapping[str, list[str]] = manifest["corpus"].get("encodings", {})
    return "; ".join(f"{name}: {first_names(files, len(files), show)}" for name, files in found.items())


@dataclass(frozen=True)
class Run:
    """Everything a run folder says of itself; a piece that is not there yet is None or empty."""

    folder: Path
    about: dict[str, Any]
    config: dict[str, Any]
    data: Path
    manifest: dict[str, Any] | None
    removed: dict[str, Removed]
    metrics: tuple[dict[str, Any], ...]
    evaluation: dict[str, Any] | None
    samples: tuple[dict[str, Any], ...]
    timings: dict[str, float]
    parameters: int | None

    def events(self, name: str) -> list[dict[str, Any]]:
        """The events of one kind by step; of a step that was run twice, the later record."""
        latest = {
            event.get("step", index): event
            for index, event in enumerate(self.metrics)
            if event["event"] == name
        }
        return [latest[step] for step in sorted(latest)]


def read_run(folder: str | Path) -> Run:
    """Read a run folder. Raises FileNotFoundError where there is none, ValueError for a damaged file."""
    folder = Path(folder)
    about = read_about(folder)
    data = data_folder(folder, about)
    config = folder / CONFIG
    manifest = read_json(data / MANIFEST)
    if manifest is not None and other_data(about, manifest):
        manifest = None  # another preparation lies there now
    return Run(
        folder=folder,
        about=about,
        config=tomllib.loads(config.read_text(encoding="utf-8")) if config.is_file() else {},
        data=data,
        manifest=manifest,
        removed={} if manifest is None else read_removed(data / REMOVED),
        metrics=tuple(read_lines(folder / METRICS)),
        evaluation=read_json(folder / EVALUATION),
        samples=tuple(read_json(folder / SAMPLES) or ()),
        timings=read_json(folder / TIMINGS) or {},
        parameters=count_parameters(folder / MODEL / WEIGHTS),
    )


def read_about(folder: Path) -> dict[str, Any]:
    """run.json, checked for its format and version."""
    about: dict[str, Any] | None = read_json(folder / ABOUT)
    if about is None:
        what = f"has no {ABOUT}" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"run: {folder} {what}; expected a folder that `lmkern train` or `lmkern demo` wrote"
        )
    found = (about.get("format"), about.get("version"))
    if found != (FORMAT, VERSION):
        raise ValueError(
            f"run: {folder / ABOUT} has format and version {found}; expected {(FORMAT, VERSION)}: "
            "read it with the lmkern that wrote it"
        )
    return about


def data_folder(folder: Path, about: dict[str, Any]) -> Path:
    """Where the run's data lies: the recorded path, which is relative to the run where it lies inside it."""
    recorded = Path(about.get("data", DATA))
    candidates = (folder / recorded, recorded, folder / DATA)
    return next((path for path in candidates if (path / MANIFEST).is_file()), recorded)


def read_json(path: Path) -> Any:
    """The file's content, None where there is no file; ValueError naming the file where it is not JSON."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"run: {path} is not JSON ({error}); it may be truncated: write it again") from error


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line cut short by a kill is left out."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"run: {path} line {number} is not JSON ({error})") from error


def read_removed(path: Path) -> dict[str, Removed]:
    """What was removed, by reason; bytes are those of UTF-8."""
    found: dict[str, Removed] = {}
    for entry in read_lines(path):
        n_bytes = (
            entry["bytes"] if "bytes" in entry else len(entry.get("text", "").encode("utf-8", "replace"))
        )
        before = found.get(entry["reason"], Removed())
        sources = (*before.sources, entry["source"])[:NAMED]
        found[entry["reason"]] = Removed(before.pieces + 1, before.bytes + n_bytes, sources)
    return found


def count_parameters(path: Path) -> int | None:
    """The elements of every tensor in a safetensors file, from its header; tied weights are stored once."""
    if not path.is_file():
        return None
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        names = file.keys()
        sizes: list[int] = [prod(file.get_slice(name).get_shape()) for name in names]
    return sum(sizes)
