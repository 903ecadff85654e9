"""What the norms on GPUs share: launches of lmkern/kernels/layer_norm/triton_kernels.py.

No atomics: forward and backward give the same bits every time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lmkern.kernels import philox, triton_runtime, tuning
from lmkern.kernels.statistics import statistics_dtype
from lmkern.kernels.triton_runtime import unavailable, unsupported

__all__ = ["NOTE", "backward", "constants", "forward", "unavailable", "unsupported"]

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

# Programs of a persistent kernel that a multiprocessor of sm_90 holds at once, by their warps.
RESIDENT = {
    "backward": {4: 3, 8: 2, 16: 1, 32: 1},
    "rows": {4: 5, 8: 3, 16: 1, 32: 1},
    "sums": {4: 6, 8: 3, 16: 1, 32: 1},
}

# Philox makes the bits of so many columns at once.
_MIN_BLOCK_E = 8


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
    rstd = x.new_empty(rows, dtype=statistics_dtype(x))
    mean = torch.empty_like(rstd) if centred else None
    dropout = _dropout(dropout_p, seed)
    options = constants("forward", width, x.dtype.itemsize, x.device)
    held = _held("forward", width, seed is not None)
    kernel = triton_kernels.forward_kernel if held else triton_kernels.wide_forward_kernel
    if programs := -(-rows // options["BLOCK_R"]):
        with triton_runtime.device_of(x):
            kernel[(programs,)](
                x, x.stride(0), residual, 0 if residual is None else residual.stride(0), weight, bias,
                y, h, mean, rstd, *dropout, rows, width, eps, offset, **options,
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
        kernel: Any, grid: tuple[int, int], results: tuple[Tensor | None, ...], options: Mapping[str, int]
    ) -> None:
        if not all(grid):
            return
        with triton_runtime.device_of(h):
            kernel[grid](
                dy, dy.stride(0), dh, 0 if dh is None else dh.stride(0), h, h.stride(0), weight, mean, rstd,
                *results, *dropout, rows, width, offset, **options,
            )  # fmt: skip

    kind = h.dtype.itemsize, h.device
    by_row, sums, dropped = any(needs[:2]), any(needs[2:]), seed is not None
    fused = by_row and sums and _held("backward", width, dropped)
    if by_row and not fused:
        options = constants("rows", width, *kind, dropout=dropped)
        if _held("rows", width, dropped):
            kernel, programs = triton_kernels.backward_kernel, _programs(h, "rows", options, 1)
        else:
            kernel, programs = triton_kernels.wide_backward_kernel, rows
        launch(kernel, (programs, 1), (dx, dresidual, None, None), options)
    name = "backward" if fused else "sums"
    options = constants(name, width, *kind, dropout=dropped)
    blocks = 1 if fused else -(-width // options["BLOCK_E"])
    programs = _programs(h, name, options, blocks)
    results = [rstd.new_empty((programs, width)) if need else None for need in needs[2:]]
    if sums:
        rows_too = (dx, dresidual) if fused else (None, None)
        launch(triton_kernels.backward_kernel, (programs, blocks), (*rows_too, *results), options)
    dweight, dbias = (None if partial is None else partial.sum(0) for partial in results)
    return dx, dresidual, dweight, dbias


@tuning.remembered
def constants(
    kernel: str, width: int, itemsize: int, device: torch.device, *, dropout: bool = False
) -> dict[str, int]:
    """The compile-time arguments of a kernel for rows of this width and elements of so many bytes.

    kernel: "forward"; "backward", dx or dresidual with the sums; "rows", those alone; "sums", these alone.
    """
    architecture = tuning.architecture(device)
    if kernel == "sums":
        width = min(width, SUMS_BLOCK)
    held = kernel == "sums" or _held(kernel, width, dropout)
    block_e = max(_MIN_BLOCK_E, 1 << max(width - 1, 0).bit_length()) if held else WIDE_BLOCK
    # A program has at most 1024 threads: 32 a warp, 64 on AMD's GPUs.
    most_warps = 16 if architecture.startswith("gfx") else 32
    default = {"num_warps": min(most_warps, max(4, block_e // (32 * ELEMENTS_PER_THREAD)))}
    if held:
        default["BLOCK_R"] = max(1, TILE // block_e)
        if kernel != "forward":
            # With two stages the next rows are on their way while these are computed; the bits of dropout
            # take the registers for that.
            default["STAGES"] = 1 if dropout or default["num_warps"] > 16 else 2
    shape_class = f"{itemsize}-{block_e if held else 'wide'}{'-dropout' if dropout else ''}"
    chosen = tuning.lookup("layer_norm", kernel, architecture, shape_class, default)
    return {"BLOCK_R": 1, "BLOCK_E": block_e, **chosen}


def _held(kernel: str, width: int, dropout: bool) -> bool:
    """Whether a program holds whole rows of this width in registers."""
    most = MAX_FUSED_WIDTH if kernel == "backward" or (kernel == "rows" and dropout) else MAX_WIDTH
    return width <= most


def _programs(h: Tensor, kernel: str, options: Mapping[str, int], blocks: int) -> int:
    """Programs that share the rows of a block of columns: as many as are resident at once."""
    resident = triton_runtime.processors(h.device) * RESIDENT[kernel].get(options["num_warps"], 4)
    return min(-(-h.shape[0] // options["BLOCK_R"]), max(1, resident // max(1, blocks)))


def _dropout(dropout_p: float, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    """The seed, the threshold and the scale of what is kept."""
    if dropout_p == 0.0 or seed is None:
        return None, 0, 1.0
    return seed, philox.threshold(dropout_p), philox.keep_scale(dropout_p)
