"""Layer norm on GPUs through Triton: grids, block sizes and allocation.

The kernels are in triton_kernels.py. No atomics: forward and backward give the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmkern.kernels import triton_runtime
from lmkern.kernels.backends import Call

# A program holds whole rows in registers, and these are the widest that spill nothing on sm_90: where one
# pass makes dx, dweight and dbias together; where it makes dx alone, or y.
MAX_FUSED_WIDTH = 8192
MAX_WIDTH = 16384

# Elements a program works on at once: enough to keep its loads in flight where rows are short.
TILE = 2048

# Elements a thread holds of each of the backward's four tiles (x_hat, dy, dweight, dbias).
ELEMENTS_PER_THREAD = 16


NOTE = triton_runtime.NOTE


def unavailable() -> str | None:
    return triton_runtime.unavailable()


def unsupported(call: Call) -> str | None:
    if reason := triton_runtime.unsupported(call):
        return reason
    x = call.tensors["x"]
    if x is not None and not 1 <= x.shape[1] <= MAX_WIDTH:
        return f"takes rows of 1 to {MAX_WIDTH} elements; got {x.shape[1]}"
    return None


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from lmkern.kernels.layer_norm import triton_kernels

    rows, width = x.shape
    y = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    mean = torch.empty(rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    options = constants(width)
    if programs := -(-rows // options["BLOCK_R"]):
        with triton_runtime.device_of(x):
            triton_kernels.forward_kernel[(programs,)](
                x, x.stride(0), weight, bias, y, mean, rstd, rows, width, eps, **options
            )
    return y, mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if x.shape[1] <= MAX_FUSED_WIDTH or not any(needs[1:]):
        return _backward(dy, x, weight, mean, rstd, needs)
    dx, _, _ = _backward(dy, x, weight, mean, rstd, (needs[0], False, False))
    # Without dx the columns do not depend on each other.
    pieces = zip(torch.split(dy, MAX_FUSED_WIDTH, 1), torch.split(x, MAX_FUSED_WIDTH, 1), strict=True)
    sums = [_backward(*piece, None, mean, rstd, (False, *needs[1:]))[1:] for piece in pieces]
    dweight = torch.cat([piece[0] for piece in sums]) if needs[1] else None  # type: ignore[misc]
    dbias = torch.cat([piece[1] for piece in sums]) if needs[2] else None  # type: ignore[misc]
    return dx, dweight, dbias


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    from lmkern.kernels.layer_norm import triton_kernels

    rows, width = x.shape
    options = constants(width)
    # As many programs as are resident at once: 16 warps a multiprocessor at 128 registers a thread.
    resident = triton_runtime.processors(x.device) * max(1, 16 // options["num_warps"])
    programs = min(-(-rows // options["BLOCK_R"]), resident)
    dx = torch.empty((rows, width), dtype=x.dtype, device=x.device) if needs[0] else None
    dweight, dbias = (
        torch.empty((programs, width), dtype=torch.float32, device=x.device) if need else None
        for need in needs[1:]
    )
    if programs and any(needs):
        with triton_runtime.device_of(x):
            triton_kernels.backward_kernel[(programs,)](
                dy, dy.stride(0), x, x.stride(0), weight, mean, rstd, dx, dweight, dbias, rows, width,
                **options,
            )  # fmt: skip
    return dx, None if dweight is None else dweight.sum(0), None if dbias is None else dbias.sum(0)


def constants(width: int) -> dict[str, int]:
    """The compile-time arguments of both kernels for rows of this width."""
    block_e = 1 << (width - 1).bit_length()
    block_r = max(1, TILE // block_e)
    # A program has at most 1024 threads: 32 a warp, 64 on AMD's GPUs.
    num_warps = min(32 if torch.version.hip is None else 16, max(4, block_e // (32 * ELEMENTS_PER_THREAD)))
    return {"BLOCK_R": block_r, "BLOCK_E": block_e, "num_warps": num_warps}
