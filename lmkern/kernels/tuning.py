"""Which tile sizes a Triton kernel runs with: those that its op lists, or those that a user's GPU chose.

The defaults stand as data beside the kernels (`constants()` in lmkern/kernels/<op>/triton.py), reasoned
from the compiler's reports, so a first call searches nothing. `lmkern tune-kernels` measures candidates on
the GPU at hand and writes those that are faster into a file that `lookup` lays over the defaults:

    {"format": 1, "architectures": {"sm_90": {"gpu": "NVIDIA H200", "triton": "3.6.0",
        "kernels": {"attention forward 2-128": {"BLOCK_M": 128, "num_warps": 8}}}}}

Keys are an architecture ("sm_90", "gfx942"), an op, a kernel and a class of shapes, all of them strings that
the op makes from dtypes and widths, never from lengths or batch sizes.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec

import torch

from lmkern.files import write_json

FORMAT = 1
REMEDY = "delete it, or write it anew with lmkern tune-kernels"

# What a program may have, in bytes. CUDA C++ Programming Guide, "Compute Capabilities"; AMD: the LDS.
SHARED_MEMORY = {
    "sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_87": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024,
    "sm_100": 227 * 1024, "sm_103": 227 * 1024, "sm_120": 99 * 1024, "sm_121": 99 * 1024,
    "gfx90a": 64 * 1024, "gfx942": 64 * 1024, "gfx950": 160 * 1024,
}  # fmt: skip
LEAST_SHARED_MEMORY = 64 * 1024

Key = tuple[str, str, str, str]
Constants = Mapping[str, int]
P = ParamSpec("P")

# Set by `assume`, `override` and `observe`.
_assumed: str | None = None
_overrides: Mapping[Key, Constants] | None = None
_observed: dict[Key, dict[str, int]] | None = None

# What is kept of files and look-ups.
_kept: list[Any] = []


def lookup(op: str, kernel: str, architecture: str, shape_class: str, default: Constants) -> dict[str, int]:
    """The constants of a kernel: the op's default, with what the user's own GPU chose in its place.

    default: every compile-time argument and launch option that may be tuned ("BLOCK_M", "num_warps", ...).
    """
    key = (architecture, op, kernel, shape_class)
    if _observed is not None:
        _observed[key] = dict(default)
    if _overrides is not None:
        return {**default, **_overrides.get(key, {})}
    chosen = _chosen().get(key)
    if chosen is None:
        return dict(default)
    if unknown := chosen.keys() - default.keys():
        _warn_once(
            f"lmkern: {cache_path()} sets {', '.join(sorted(unknown))} of {op} {kernel}, which it does not "
            f"have; the entry is not used: {REMEDY}"
        )
        return dict(default)
    return {**default, **chosen}


def remembered(function: Callable[P, dict[str, Any]]) -> Callable[P, Mapping[str, Any]]:
    """Keeps what a function makes of `lookup` for each of its arguments, until what that says may change.

    All callers get one dictionary, to be read alone. Arguments: what constants depend on, never a length.
    """
    keep: Any = cache(function)

    @wraps(function)
    def found(*arguments: P.args, **options: P.kwargs) -> Mapping[str, Any]:
        # Who observes must see each look-up.
        made: Callable[P, dict[str, Any]] = keep if _observed is None else function
        return made(*arguments, **options)

    _kept.append(keep)
    return found


def _forget() -> None:
    for keep in _kept:
        keep.cache_clear()


def architecture(device: torch.device | None = None) -> str:
    """The architecture of a GPU (None: the current one), as compilers name it: "sm_90", "gfx942".

    "interpreter" for a CPU, which runs kernels in Triton's interpreter alone.
    """
    if _assumed is not None:
        return _assumed
    if device is None:
        return _architecture(torch.cuda.current_device()) if torch.cuda.is_available() else "interpreter"
    if device.type != "cuda":
        return "interpreter"
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _architecture(device: int) -> str:
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        # "gfx942:sramecc+:xnack-"
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def shared_memory(architecture: str) -> int:
    """Bytes of shared memory that a program may have; for an unknown architecture what all have."""
    return SHARED_MEMORY.get(architecture, LEAST_SHARED_MEMORY)


@contextmanager
def assume(architecture: str) -> Iterator[None]:
    """Within it `architecture` is the one named and no user's file is read: for compiling without a GPU."""
    global _assumed
    before, _assumed = _assumed, architecture
    try:
        with override({}):
            yield
    finally:
        _assumed = before


@contextmanager
def override(constants: Mapping[Key, Constants]) -> Iterator[None]:
    """Within it these keys have these constants, all others their defaults: for searching."""
    global _overrides
    before, _overrides = _overrides, constants
    _forget()
    try:
        yield
    finally:
        _overrides = before
        _forget()


@contextmanager
def observe() -> Iterator[dict[Key, dict[str, int]]]:
    """Collects what is looked up within it, with its defaults."""
    global _observed
    before, _observed = _observed, {}
    try:
        yield _observed
    finally:
        _observed = before


def cache_path() -> Path:
    """LMKERN_TUNING; otherwise tuning.json in the user's cache folder."""
    if chosen := os.environ.get("LMKERN_TUNING"):
        return Path(chosen)
    folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(folder).expanduser() / "lmkern" / "tuning.json"


def load(path: Path) -> dict[Key, dict[str, int]]:
    """The entries of a file of constants; none without a file. ValueError, in words, for a broken one."""
    return {
        (name, *_split(kernel, path)): constants
        for name, section in _sections(path).items()
        for kernel, constants in section["kernels"].items()
    }


def save(path: Path, architecture: str, entries: Mapping[Key, Constants], about: Mapping[str, str]) -> None:
    """Write the entries of an architecture; those of others in the file stay.

    about: the GPU and the versions that chose them.
    """
    sections = _sections(path)
    kernels = {" ".join(key[1:]): dict(constants) for key, constants in entries.items()}
    sections[architecture] = {**about, "kernels": kernels}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"format": FORMAT, "architectures": sections})
    _forget()


@cache
def _chosen() -> dict[Key, dict[str, int]]:
    """The user's entries, read once; a file that cannot be read is named in a warning, and not used."""
    path = cache_path()
    if os.environ.get("LMKERN_TUNING") and not path.exists():
        _warn_once(f"lmkern: LMKERN_TUNING names {path}, which is not there; the kernels' defaults are used")
    try:
        return load(path)
    except (ValueError, OSError) as error:
        _warn_once(f"lmkern: {error}; the kernels' defaults are used: {REMEDY}")
        return {}


_kept.append(_chosen)


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def _sections(path: Path) -> dict[str, dict[str, Any]]:
    """ "architectures" of a file, with every type checked."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT}; got {found!r}")
    sections = content.get("architectures")
    if not _is_table(sections) or not all(_is_table(section.get("kernels")) for section in sections.values()):
        raise ValueError(f"{path}: expected architectures, each with a table of kernels")
    for section in sections.values():
        for kernel, constants in section["kernels"].items():
            _split(kernel, path)
            # A bool is an int to Python, and no tile size.
            if not isinstance(constants, dict) or not all(type(x) is int for x in constants.values()):
                raise ValueError(f"{path}: {kernel!r}: expected integers by name; got {constants!r}")
    return dict(sections)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(x, dict) for x in value.values())


def _split(kernel: str, path: Path) -> tuple[str, str, str]:
    parts = kernel.split(" ")
    if len(parts) != 3:
        raise ValueError(f"{path}: expected 'op kernel shape_class'; got {kernel!r}")
    return parts[0], parts[1], parts[2]
