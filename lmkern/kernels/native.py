"""The compiled CPU modules: one per instruction set, the best that this machine can run.

They are imported after torch, always through this file: the modules are compiled with -fopenmp but not linked
against an OpenMP library, and find torch's own in the global scope, so the process has one thread pool.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

# Best first. Each is the module lmkern._cpu_<name>, compiled from the same sources (CMakeLists.txt), those
# kernels and dtypes that its instructions serve: BF16's are for bfloat16, AMX's for what multiplies matrices.
INSTRUCTION_SETS = ("amx", "avx512_bf16", "avx512", "avx2", "baseline")

# enum class Dtype in csrc/core/types.hpp.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

# What the loader said of a module that is there and cannot be loaded.
_import_errors: dict[str, str] = {}


def function(name: str, dtype: torch.dtype) -> Callable[[bytes], None]:
    """A kernel for tensors of dtype: of the chosen instruction set, or the first below that has it."""
    return _function(instruction_set(), name, dtype)


@cache
def instruction_set() -> str:
    """The best instruction set of this processor, or the one LMKERN_CPU_ISA names.

    RuntimeError when no module was built, ValueError when LMKERN_CPU_ISA names one that is not here or cannot
    be loaded.
    """
    modules = cpu_modules()
    name = forced()
    if name in _import_errors:
        raise ValueError(f"LMKERN_CPU_ISA: the module of {name!r} cannot be loaded: {_import_errors[name]}")
    if name and name not in modules:
        here = ", ".join(modules) or "none"
        raise ValueError(
            f"LMKERN_CPU_ISA: expected an instruction set of this machine ({here}); got {name!r}"
        )
    if not modules:
        raise RuntimeError(f"lmkern: the CPU kernels {cpu_unavailable()}")
    return name or next(iter(modules))


def forced() -> str:
    """What LMKERN_CPU_ISA says; nothing where it is not set."""
    return os.environ.get("LMKERN_CPU_ISA", "")


def refusal() -> str | None:
    """Why every call raises although there are modules: LMKERN_CPU_ISA names another. Else None."""
    try:
        instruction_set()
    except ValueError as error:
        return str(error)
    except RuntimeError:
        pass  # that is cpu_unavailable's
    return None


def serves(chosen: str, name: str, dtype: torch.dtype) -> bool:
    """Whether the module of an instruction set has this kernel for dtype."""
    return bool(cpu_modules()[chosen].serves(name, DTYPE_CODES[dtype]))


@cache
def _function(chosen: str, name: str, dtype: torch.dtype) -> Callable[[bytes], None]:
    upto = INSTRUCTION_SETS[INSTRUCTION_SETS.index(chosen) :]
    first = next(isa for isa in upto if isa in cpu_modules() and serves(isa, name, dtype))
    kernel: Callable[[bytes], None] = getattr(cpu_modules()[first], name)
    return kernel


@cache
def cpu_modules() -> dict[str, ModuleType]:
    """Every compiled module that this processor can run, best first."""
    baseline = _import("baseline")
    if baseline is None:
        return {}
    supported = baseline.supported_instruction_sets()
    found = {name: _import(name) for name in INSTRUCTION_SETS if name in supported}
    return {name: module for name, module in found.items() if module is not None}


def import_errors() -> dict[str, str]:
    """What the loader said of each module that is there, for this processor, and cannot be loaded."""
    cpu_modules()
    return _import_errors


@cache
def cpu_unavailable() -> str | None:
    """Why no compiled module can be used, in words; None when one can."""
    if cpu_modules():
        return None
    if reason := build_failure("cpu"):
        return f"was not built: {reason}"
    if _import_errors:
        return f"cannot be loaded: {next(iter(_import_errors.values()))}"
    return "was not built: no compiled module beside the package; run pip install -e ."


def build_failure(kind: str) -> str | None:
    """What setup.py recorded when the "cpu" or "cuda" modules could not be compiled, in one line."""
    report = Path(__file__).parents[1] / f"_build_failure_{kind}.txt"
    if not report.exists():
        return None
    # The error, a command line for the most part, and under it what the tools said.
    error, *said = report.read_text(encoding="utf-8").strip().splitlines()
    return " ".join(" ".join(said).split()) or error


def threads() -> int:
    """How many threads a kernel may use: torch's count, since a fresh Python thread has OpenMP's default."""
    return torch.get_num_threads()


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"lmkern._cpu_{name}")
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        _import_errors[name] = str(error)
        return None
