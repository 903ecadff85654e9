"""Rotary positions on GPUs through Triton: grid, block sizes and allocation."""

from __future__ import annotations

import torch
from torch import Tensor

from lmkern.kernels import triton_runtime, tuning
from lmkern.kernels.rotary.layout import empty_like
from lmkern.kernels.triton_runtime import unavailable, unsupported

__all__ = ["NOTE", "backward", "constants", "forward", "unavailable", "unsupported"]

NOTE = triton_runtime.NOTE

# Elements of x that a program turns, and the threads that share them.
TILE = 4096
NUM_WARPS = 4


def forward(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    *,
    offset: int,
    interleaved: bool,
    inverse: bool,
    inplace: bool,
) -> Tensor:
    from lmkern.kernels.rotary import triton_kernels

    B, H, N, D = x.shape
    P, pairs = cos.shape
    y = x if inplace else empty_like(x)
    grain, (x_, y_) = triton_runtime.strided(x, y)
    options = constants(x.device, x.dtype.itemsize, D, pairs, grain, interleaved, inplace)
    token_blocks = -(-N // options["BLOCK_N"])
    if x.numel():
        with triton_runtime.device_of(x):
            triton_kernels.forward_kernel[(B * H * token_blocks,)](
                *x_, *y_, cos, sin, cos.stride(0), positions,
                H, N, D, P, pairs, offset, token_blocks, -1.0 if inverse else 1.0, **options,
            )  # fmt: skip
    return y


def backward(
    dy: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    *,
    offset: int,
    interleaved: bool,
    inverse: bool,
) -> Tensor:
    return forward(
        dy, cos, sin, positions, offset=offset, interleaved=interleaved, inverse=not inverse, inplace=False
    )


@tuning.remembered
def constants(
    device: torch.device,
    itemsize: int,
    head_dim: int,
    pairs: int,
    grain: int,
    interleaved: bool,
    inplace: bool,
) -> dict[str, int]:
    """The compile-time arguments of the kernel."""
    block_p = 1 << max(pairs - 1, 0).bit_length()
    rest = head_dim - 2 * pairs
    default = {"BLOCK_N": max(1, TILE // (2 * block_p)), "num_warps": NUM_WARPS}
    shape_class = f"{itemsize}-{block_p}{'-interleaved' if interleaved else ''}"
    chosen = tuning.lookup("rotary", "forward", tuning.architecture(device), shape_class, default)
    return {
        "GRAIN": grain,
        "INTERLEAVED": interleaved,
        "IN_PLACE": inplace,
        "BLOCK_P": block_p,
        "BLOCK_REST": 1 << (rest - 1).bit_length() if rest else 0,
        **chosen,
    }
