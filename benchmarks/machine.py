"""The machine of a run: its name, what it is, its two ceilings, and the commit that ran on it."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import time
from pathlib import Path

import torch

from benchmarks.contest import DTYPES, dtype_name
from lmkern.ceiling import measure_ceiling, synchronize
from lmkern.kernels import backends, native
from lmkern.machine import hardware, versions

ROOT = Path(__file__).parents[1]
# What benchmarks write themselves.
WRITTEN = (":!benchmarks/results", ":!docs/benchmarks", ":!README.md")
# What holds torch, and the libraries under it, to an instruction set.
TORCH_LIMITS = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
# Of the memory that is free, what is written once before the first row.
TOUCHED = 0.8
# More than any last-level cache holds, so that the copy runs at the speed of memory; on a GPU it lasts long
# beside a launch.
COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}


def choose_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the instruction set that our kernels use: "amd-epyc-avx512"."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{hardware()['processor']} {instruction_set()}"
    # A trademark sign, a clock rate or "Processor" says nothing that tells two machines apart.
    name = re.sub(r"\((R|TM)\)|@.*?GHz|\bCPU\b|\bProcessor\b", " ", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def instruction_set() -> str:
    """That of the compiled CPU module in use; torch's where none was compiled."""
    if native.cpu_modules():
        return native.instruction_set()
    return torch.backends.cpu.get_cpu_capability()


def environment() -> dict[str, str]:
    """Hardware and versions, as the page prints them."""
    return hardware() | {"CPU module used": instruction_set()} | torch_limits() | versions()


def torch_limits() -> dict[str, str]:
    """ "torch held to" what, where the environment says so."""
    limits = [f"{name}={os.environ[name]}" for name in TORCH_LIMITS if name in os.environ]
    return {"torch held to": ", ".join(limits)} if limits else {}


def one_sided_limit() -> str | None:
    """Why a run would compare unequal things: one side is held to an instruction set, the other not.

    None where both or neither are.
    """
    names = ("LMKERN_CPU_ISA", *TORCH_LIMITS)
    missing = [name for name in names if name not in os.environ]
    if len(missing) in (0, len(names)):
        return None
    there = [name for name in names if name not in missing]
    return (
        "ours and torch must be held to one instruction set, or neither; "
        f"got {', '.join(there)} without {', '.join(missing)}; make bench-avx2 sets them all"
    )


def gaps() -> dict[str, str]:
    """Why a backend has no rows, by "op backend"."""
    return {f"{row.op} {row.backend}": row.reason for row in backends.describe() if not row.usable}


def measure_products(device: torch.device) -> dict[str, float]:
    """FLOP/s of torch's matrix product by dtype: the best of ten each."""
    if device.type == "cpu":
        touch_memory()
    return {dtype_name(dtype): measure_ceiling(device, dtype, tries=10) for dtype in DTYPES}


def ceilings(device: torch.device, products: dict[str, float]) -> dict[str, float]:
    """FLOP/s by dtype, and "copy", bytes/s read plus written, the best of ten.

    What torch has no instructions for can still be multiplied in float32.
    """
    slowest = products["float32"]
    by_dtype = {name: max(speed, slowest) for name, speed in products.items()}
    return by_dtype | {"copy": copy_bandwidth(device)}


def touch_memory() -> None:
    """Writes much of the free memory once and frees it.

    A virtual machine gets its memory from its host when it first writes it, at a tenth of the speed of a page
    fault that follows: without this the rows that come first pay for it.
    """
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        torch.empty(int(TOUCHED * free), dtype=torch.uint8).fill_(1)


def copy_bandwidth(device: torch.device, tries: int = 10) -> float:
    size = COPY_BYTES[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    best = float("inf")
    for _ in range(tries):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size / best


def commit() -> str:
    """The commit of this checkout, with a note when files that a number depends on differ from it.

    Outside git LMKERN_COMMIT where it is set, else a digest of the sources.
    """
    if given := os.environ.get("LMKERN_COMMIT"):
        return given
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *WRITTEN)
    except (OSError, subprocess.CalledProcessError):
        return f"sources{sources()[:12]}"
    return f"{head} with local changes" if changed else head


def sources() -> str:
    """SHA-256, in hexadecimal, of every file that a kernel's result or speed depends on."""
    digest = hashlib.sha256()
    for folder in ("lmkern", "csrc", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".py", ".cpp", ".hpp", ".cu", ".cuh"}:
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
