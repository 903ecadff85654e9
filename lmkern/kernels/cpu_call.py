"""What the Python half of every CPU kernel shares: dtype codes, why the module cannot take a call, and what
torch is good for."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lmkern.kernels import native
from lmkern.kernels.backends import Call
from lmkern.kernels.native import DTYPE_CODES
from lmkern.memory import HUGE_BYTES, prefer_huge_pages

__all__ = ["DTYPE_CODES", "on_huge_pages", "pointer", "torch_multiplies", "unavailable", "unsupported"]


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


@cache
def torch_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of this dtype in vector instructions here.

    It asks the same of oneDNN, and where that cannot its own product of 16 bits takes 5 to 70 times as long
    as float32's.
    """
    if dtype.itemsize > 2:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    supported = ops._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else ops._is_mkldnn_fp16_supported
    return bool(supported())
