"""Activations on GPUs through Triton: grids, block sizes and allocation. No atomics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmkern.kernels import triton_runtime, tuning
from lmkern.kernels.statistics import statistics_dtype
from lmkern.kernels.triton_runtime import unavailable, unsupported

__all__ = ["NOTE", "backward", "constants", "forward", "unavailable", "unsupported"]

NOTE = triton_runtime.NOTE

# Elements that a program works on at once, columns among them at most, and the threads that share them.
TILE = {"forward": 4096, "backward": 2048}
BLOCK_F = 1024
NUM_WARPS = 4
# Programs of the backward pass that a multiprocessor holds at once.
RESIDENT = 4


def forward(x: Tensor, bias: Tensor | None, *, function: str, gated: bool) -> Tensor:
    from lmkern.kernels.activation import triton_kernels

    R, width = x.shape
    F = width // 2 if gated else width
    y = x.new_empty(R, F)
    options = constants("forward", x.device, x.dtype.itemsize, F, function, gated)
    grid = (-(-R // options["BLOCK_R"]), -(-F // options["BLOCK_F"]))
    if all(grid):
        with triton_runtime.device_of(x):
            triton_kernels.forward_kernel[grid](x, x.stride(0), bias, y, R, F, **options)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    *,
    function: str,
    gated: bool,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    from lmkern.kernels.activation import triton_kernels

    R, width = x.shape
    F = width // 2 if gated else width
    options = constants("backward", x.device, x.dtype.itemsize, F, function, gated)
    blocks = -(-F // options["BLOCK_F"])
    programs = -(-R // options["BLOCK_R"])
    if needs[1]:
        # Few enough for their sums to be little, and as many as are resident at once.
        programs = min(programs, max(1, triton_runtime.processors(x.device) * RESIDENT // max(1, blocks)))
    dx = x.new_empty(R, width) if needs[0] else None
    dbias = x.new_empty(programs, width, dtype=statistics_dtype(x)) if needs[1] else None
    if programs and blocks and any(needs):
        with triton_runtime.device_of(x):
            triton_kernels.backward_kernel[(programs, blocks)](
                dy, dy.stride(0), x, x.stride(0), bias, dx, dbias, R, F, **options
            )
    return dx, None if dbias is None else dbias.sum(0)


@tuning.remembered
def constants(
    kernel: str, device: torch.device, itemsize: int, F: int, function: str, gated: bool
) -> dict[str, Any]:
    """The compile-time arguments of a kernel for F columns."""
    block_f = min(BLOCK_F, 1 << max(F - 1, 0).bit_length())
    tile = TILE[kernel] // 2 if gated else TILE[kernel]
    default = {"BLOCK_R": max(1, tile // block_f), "BLOCK_F": block_f, "num_warps": NUM_WARPS}
    shape_class = f"{itemsize}-{block_f}-{function}{'-gated' if gated else ''}"
    chosen = tuning.lookup("activation", kernel, tuning.architecture(device), shape_class, default)
    return {"FUNCTION": function, "GATED": gated, **chosen}
