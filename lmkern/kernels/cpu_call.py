"""What the Python half of every CPU kernel shares: dtype codes, and why the module cannot take a call."""

from __future__ import annotations

from torch import Tensor

from lmkern.kernels import native
from lmkern.kernels.backends import Call
from lmkern.kernels.native import DTYPE_CODES
from lmkern.memory import HUGE_BYTES, prefer_huge_pages

__all__ = ["DTYPE_CODES", "on_huge_pages", "pointer", "unavailable", "unsupported"]


def unavailable() -> str | None:
    return native.cpu_unavailable()


def unsupported(call: Call) -> str | None:
    """The reasons that hold for every op."""
    for name, tensor in call.tensors.items():
        if tensor is None:
            continue
        if not tensor.is_cpu:
            return f"takes CPU tensors; {name} is on {tensor.device}"
        if tensor.dtype not in DTYPE_CODES:
            return f"takes float32, bfloat16, float16 and float64; {name} is {tensor.dtype}"
    return unavailable()


def pointer(tensor: Tensor | None) -> int:
    """The address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def on_huge_pages(tensor: Tensor) -> Tensor:
    """The tensor, new and not yet written; a large one on the CPU will lie on huge pages."""
    if tensor.nbytes >= HUGE_BYTES and tensor.is_cpu:
        prefer_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor
