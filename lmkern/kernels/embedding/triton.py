"""Embedding on GPUs through Triton: grids, block sizes, allocation, and the order of the tokens.

No atomics: torch sorts the tokens, keeping the order of equal ones, and a row of the gradient has one owner.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmkern.kernels import triton_runtime, tuning
from lmkern.kernels.checked import check_range
from lmkern.kernels.triton_runtime import unavailable, unsupported

__all__ = ["NOTE", "backward", "constants", "forward", "unavailable", "unsupported"]

NOTE = triton_runtime.NOTE

# Tokens and columns that a program reads at once, and the threads that share them.
BLOCK_N = {"forward": 4, "backward": 8}
BLOCK_E = {"forward": 1024, "backward": 256}
NUM_WARPS = 4


def forward(tokens: Tensor, weight: Tensor) -> Tensor:
    from lmkern.kernels.embedding import triton_kernels

    (N,), (V, E) = tokens.shape, weight.shape
    check_range("embedding", "tokens", tokens, V)
    y = weight.new_empty(N, E)
    options = constants("forward", weight.device, weight.dtype.itemsize, E)
    grid = (-(-N // options["BLOCK_N"]), -(-E // options["BLOCK_E"]))
    if all(grid):
        with triton_runtime.device_of(weight):
            triton_kernels.forward_kernel[grid](tokens, weight, y, N, V, E, **options)
    return y


def backward(dy: Tensor, tokens: Tensor, *, vocabulary: int, padding_idx: int) -> Tensor:
    from lmkern.kernels.embedding import triton_kernels

    E = dy.shape[1]
    dweight = dy.new_empty(vocabulary, E)
    in_order, order = torch.sort(tokens, stable=True)
    every = torch.arange(vocabulary + 1, device=tokens.device)
    starts = torch.searchsorted(in_order, every)
    options = constants("backward", dy.device, dy.dtype.itemsize, E)
    grid = (vocabulary, -(-E // options["BLOCK_E"]))
    if all(grid):
        with triton_runtime.device_of(dy):
            triton_kernels.backward_kernel[grid](
                dy, dy.stride(0), order, starts, dweight, vocabulary, E, padding_idx, **options
            )
    return dweight


@tuning.remembered
def constants(kernel: str, device: torch.device, itemsize: int, E: int) -> dict[str, int]:
    """The compile-time arguments of a kernel for rows of E elements."""
    block_e = min(BLOCK_E[kernel], 1 << max(E - 1, 0).bit_length())
    block_n = BLOCK_N[kernel] * BLOCK_E[kernel] // block_e
    default = {"BLOCK_N": min(block_n, 64), "BLOCK_E": block_e, "num_warps": NUM_WARPS}
    shape_class = f"{itemsize}-{block_e}"
    return tuning.lookup("embedding", kernel, tuning.architecture(device), shape_class, default)
