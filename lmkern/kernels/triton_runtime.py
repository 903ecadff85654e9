"""What the Triton backends share: whether they can run here, and on which tensors.

Triton itself is imported when a kernel is first launched.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from lmkern.kernels.backends import Call

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# What `lmkern doctor` says where they can run.
NOTE = "has not been run on a GPU yet; its tests ran in Triton's interpreter"

# Programs of a persistent kernel under the interpreter: more than one, so that partial sums are summed.
INTERPRETED_PROGRAMS = 3

_HERE = nullcontext()


@cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET, read when Triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@cache
def unavailable() -> str | None:
    """Why no Triton kernel can run on this machine, in words; None when one can."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton; pip install triton"
    if interpreted():
        return None
    if torch.cuda.is_available():
        # It compiles what launches a kernel; the kernels themselves need none.
        if any(os.environ.get("CC") or shutil.which(name) for name in ("gcc", "clang")):
            return None
        return "needs a C compiler, with which Triton makes its launchers; install gcc, or name one in CC"
    return (
        "needs a CUDA or ROCm GPU and none is visible (TRITON_INTERPRET=1 runs the kernels slowly on the CPU)"
    )


def unsupported(call: Call, *, float64: bool = True) -> str | None:
    """Why these tensors cannot go through a Triton kernel, in words; None when they can.

    float64: whether the kernel takes that too.
    """
    if reason := unavailable():
        return reason
    device = None
    for x in call.tensors.values():
        if x is not None:
            if x.dtype not in DTYPES and not (float64 and x.dtype == torch.float64):
                return f"takes float32, float16 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
            device = device or x.device
    if not interpreted():
        return _unfit(device)
    # The interpreter is a thousand times slower than any other backend: never an automatic choice.
    return (
        None if call.backend == "triton" else "is Triton's interpreter here; ask for it with backend='triton'"
    )


@cache
def _unfit(device: torch.device) -> str | None:
    """Why Triton cannot launch kernels on this device; None when it can."""
    if device.type != "cuda":
        return f"needs tensors on a GPU; these are on {device}"
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return None
    return f"needs compute capability 8.0; {torch.cuda.get_device_name(device)} has {major}.{minor}"


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors (NVIDIA) or compute units (AMD) of a GPU."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


Layout = tuple[Tensor | None, int, int, int, int]


def strided(*tensors: Tensor | None) -> tuple[int, list[Layout]]:
    """GRAIN, and each tensor (B, H, N, D) followed by its strides, as kernels take them: all but the last are
    counted in GRAIN elements, and 0 along dimensions of size 1.

    GRAIN is the most elements, up to 16, that all these strides are multiples of: a property of a layout and
    its head_dim. A stride over heads is one of the length too, and Triton, which would look at each stride,
    would compile anew for it.
    """
    outer = [(0, 0, 0, 0) if x is None else _outer(x) for x in tensors]
    bits = 0
    for b, h, n, _ in outer:
        bits |= b | h | n
    # The lowest bit that any of them has.
    grain = bits & -bits & 15 or 16
    return grain, [
        (x, b // grain, h // grain, n // grain, d) for x, (b, h, n, d) in zip(tensors, outer, strict=True)
    ]


def _outer(x: Tensor) -> tuple[int, int, int, int]:
    """x's strides, 0 along the dimensions of size 1 but the last."""
    (B, H, N, _), (b, h, n, d) = x.shape, x.stride()
    return b if B > 1 else 0, h if H > 1 else 0, n if N > 1 else 0, d


def device_of(x: Tensor) -> AbstractContextManager[None]:
    """Makes x's GPU the current one, where Triton launches; nothing where it is, and for a CPU tensor."""
    device = x.get_device()
    return _HERE if device < 0 or device == torch.cuda.current_device() else torch.cuda.device(device)
