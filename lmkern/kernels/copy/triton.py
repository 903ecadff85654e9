"""Copies on GPUs through Triton: grids, block sizes and allocation."""

from __future__ import annotations

import torch
from torch import Tensor

from lmkern.kernels import triton_runtime, tuning
from lmkern.kernels.triton_runtime import unavailable, unsupported

__all__ = ["NOTE", "backward", "constants", "forward", "unavailable", "unsupported"]

NOTE = triton_runtime.NOTE

# Elements of a program where both sides lie alike; rows and columns of a tile where they do not.
BLOCK = 4096
TILE = 64
NUM_WARPS = 4


def forward(x: Tensor, *, dtype: torch.dtype, transposed: bool) -> Tensor:
    from lmkern.kernels.copy import triton_kernels

    y = x.new_empty(x.mT.shape, dtype=dtype) if transposed else torch.empty_like(x, dtype=dtype)
    if not x.numel():
        return y
    if (x.mT.is_contiguous() if transposed else x.stride() == y.stride()) or x.dim() == 0:
        options = constants("flat", x.device, x.dtype.itemsize, y.dtype.itemsize)
        programs = -(-x.numel() // options["BLOCK"])
        with triton_runtime.device_of(x):
            triton_kernels.flat_kernel[(programs,)](x, y, x.numel(), **options)
        return y
    batches = x.reshape(-1, *x.shape[-2:]) if x.dim() > 2 else x.reshape((1,) * (3 - x.dim()) + x.shape)
    options = constants("tile", x.device, x.dtype.itemsize, y.dtype.itemsize)
    B, R, C = batches.shape
    programs = B * -(-R // options["BLOCK_R"]) * -(-C // options["BLOCK_C"])
    with triton_runtime.device_of(x):
        triton_kernels.tile_kernel[(programs,)](
            batches, *batches.stride(), y, B, R, C, TRANSPOSED=transposed, **options
        )
    return y


def backward(dy: Tensor, *, dtype: torch.dtype, transposed: bool) -> Tensor:
    return forward(dy, dtype=dtype, transposed=transposed)


@tuning.remembered
def constants(kernel: str, device: torch.device, itemsize: int, itemsize_out: int) -> dict[str, int]:
    """The compile-time arguments of a kernel, but for TRANSPOSED."""
    default = {"BLOCK": BLOCK} if kernel == "flat" else {"BLOCK_R": TILE, "BLOCK_C": TILE}
    shape_class = f"{itemsize}-{itemsize_out}"
    architecture = tuning.architecture(device)
    return tuning.lookup("copy", kernel, architecture, shape_class, {**default, "num_warps": NUM_WARPS})
