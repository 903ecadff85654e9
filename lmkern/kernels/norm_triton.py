"""What the norms on GPUs share: launches of lmkern/kernels/layer_norm/triton_kernels.py.

No atomics: forward and backward give the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmkern.kernels import philox, triton_runtime
from lmkern.kernels.backends import Call

__all__ = ["NOTE", "backward", "constants", "forward", "sums_constants", "unavailable", "unsupported"]

NOTE = triton_runtime.NOTE

# A program holds whole rows in registers, and these are the widest that spill nothing on sm_90: where one
# pass makes dx, dweight and dbias together; where it makes dx alone, or y. Wider rows are read twice.
MAX_FUSED_WIDTH = 8192
MAX_WIDTH = 16384

# Elements a program works on at once: enough to keep its loads in flight where rows are short.
TILE = 2048

# Columns of a program that reads rows in parts, and of one that sums columns alone.
WIDE_BLOCK = 4096
SUMS_BLOCK = 1024

# Elements a thread holds of each of the backward's four tiles (h_hat, dy, dweight, dbias).
ELEMENTS_PER_THREAD = 16

# Philox makes the bits of so many columns at once.
_MIN_BLOCK_E = 8


def unavailable() -> str | None:
    return triton_runtime.unavailable()


def unsupported(call: Call) -> str | None:
    return triton_runtime.unsupported(call, float64=True)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    centred: bool,
    offset: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """y, h (None without a residual), mean (None unless centred) and rstd."""
    from lmkern.kernels.layer_norm import triton_kernels

    rows, width = x.shape
    y = x.new_empty((rows, width))
    h = None if residual is None else residual.new_empty((rows, width))
    rstd = x.new_empty(rows, dtype=triton_runtime.compute_dtype(x))
    mean = torch.empty_like(rstd) if centred else None
    options = constants(width)
    if programs := -(-rows // options["BLOCK_R"]):
        kernel = (
            triton_kernels.forward_kernel if width <= MAX_WIDTH else triton_kernels.wide_forward_kernel
        )
        with triton_runtime.device_of(x):
            kernel[(programs,)](
                x, x.stride(0), residual, 0 if residual is None else residual.stride(0), weight, bias,
                y, h, mean, rstd, *_dropout(dropout_p, seed), rows, width, eps, offset, **options,
            )  # fmt: skip
    return y, h, mean, rstd


def backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    needs: tuple[bool, bool, bool, bool],
    offset: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dresidual, dweight and dbias, where needed; dx has the dtype of dy, dresidual that of h."""
    from lmkern.kernels.layer_norm import triton_kernels

    rows, width = h.shape
    dx = dy.new_empty((rows, width)) if needs[0] else None
    dresidual = h.new_empty((rows, width)) if needs[1] else None
    dropout = _dropout(dropout_p, seed)

    def launch(
        kernel: Any, grid: tuple[int, int], results: tuple[Tensor | None, ...], options: dict[str, int]
    ) -> None:
        if not all(grid):
            return
        with triton_runtime.device_of(h):
            kernel[grid](
                dy, dy.stride(0), dh, 0 if dh is None else dh.stride(0), h, h.stride(0), weight, mean, rstd,
                *results, *dropout, rows, width, offset, **options,
            )  # fmt: skip

    by_row, sums = any(needs[:2]), any(needs[2:])
    fused = by_row and width <= (MAX_FUSED_WIDTH if sums else MAX_WIDTH)
    options = constants(width) if fused else sums_constants(width)
    blocks = 1 if fused else -(-width // options["BLOCK_E"])
    # As many programs as are resident at once: 16 warps a multiprocessor at 128 registers a thread.
    resident = triton_runtime.processors(h.device) * max(1, 16 // options["num_warps"])
    programs = min(-(-rows // options["BLOCK_R"]), max(1, resident // max(1, blocks)))
    partials = rstd.new_empty((sum(needs[2:]), programs, width))
    parts = iter(partials)
    partial_sums = tuple(next(parts) if need else None for need in needs[2:])
    if by_row and not fused:
        kernel = (
            triton_kernels.backward_kernel if width <= MAX_WIDTH else triton_kernels.wide_backward_kernel
        )
        launch(kernel, (rows, 1), (dx, dresidual, None, None), constants(width))
    if fused:
        launch(triton_kernels.backward_kernel, (programs, 1), (dx, dresidual, *partial_sums), options)
    elif sums:
        launch(triton_kernels.backward_kernel, (programs, blocks), (None, None, *partial_sums), options)
    totals = iter(partials.sum(1))
    dweight, dbias = (next(totals) if need else None for need in needs[2:])
    return dx, dresidual, dweight, dbias


def constants(width: int) -> dict[str, int]:
    """The compile-time arguments of the kernels for rows of this width."""
    if width > MAX_WIDTH:
        return {"BLOCK_R": 1, "BLOCK_E": WIDE_BLOCK, "num_warps": 8}
    block_e = max(_MIN_BLOCK_E, 1 << max(width - 1, 0).bit_length())
    block_r = max(1, TILE // block_e)
    # A program has at most 1024 threads: 32 a warp, 64 on AMD's GPUs.
    num_warps = min(32 if torch.version.hip is None else 16, max(4, block_e // (32 * ELEMENTS_PER_THREAD)))
    return {"BLOCK_R": block_r, "BLOCK_E": block_e, "num_warps": num_warps}


def sums_constants(width: int) -> dict[str, int]:
    """Those of backward_kernel where it sums columns alone."""
    return constants(min(width, SUMS_BLOCK))


def _dropout(dropout_p: float, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    """The seed, the threshold and the scale of what is kept."""
    if dropout_p == 0.0 or seed is None:
        return None, 0, 1.0
    return seed, philox.threshold(dropout_p), philox.keep_scale(dropout_p)
