"""What this machine and installation are: for `lmkern doctor`, and for what a run or a benchmark records."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch

PACKAGES = ("lmkern", "torch", "triton", "numpy", "safetensors", "tokenizers")
# Of the flags that Linux lists, those that decide which kernels run and how fast.
INSTRUCTION_SETS = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "asimd", "bf16", "sve"),
)


def versions() -> dict[str, str]:
    """Version of Python and of each package that matters, by name."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def version(package: str) -> str:
    """The installed version, or that there is none."""
    if package == __package__:
        # What runs: an installation in place keeps the number of the day it was made.
        return str(sys.modules[package].__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def hardware() -> dict[str, str]:
    """Processor, instruction sets, threads, memory and accelerator, each in words."""
    return {
        "processor": processor(),
        "instruction sets": instruction_sets(cpu_facts()),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} logical processors",
        "memory": memory(),
        "accelerator": accelerator() or "none",
    }


def processor() -> str:
    """The processor's name as Linux gives it; elsewhere as Python knows it."""
    return name_processor(cpu_facts()) or platform.processor() or platform.machine()


def name_processor(facts: dict[str, str]) -> str | None:
    """Its name in /proc/cpuinfo, with the numbers of its kind where the name has none, as in many clouds."""
    name, kind = facts.get("model name"), ("cpu family", "model")
    if name is None or any(map(str.isdigit, name)) or not all(number in facts for number in kind):
        return name
    return f"{name} family {facts['cpu family']} model {facts['model']}"


def accelerator() -> str | None:
    """The GPU's name; None without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def cpu_facts() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty where there is no such file."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def instruction_sets(facts: dict[str, str]) -> str:
    """Those of INSTRUCTION_SETS that the processor has; elsewhere than on Linux what torch found."""
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return (
        " ".join(name for name in INSTRUCTION_SETS if name in flags)
        or torch.backends.cpu.get_cpu_capability()
    )


def memory() -> str:
    """Physical memory, in GiB."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return "unknown"
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
