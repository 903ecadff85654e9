"""Layer norm on GPUs through Triton: grids, block sizes and allocation. The kernels are in triton_kernels.py."""

from __future__ import annotations

import torch
from torch import Tensor

from lmkern.kernels import triton_runtime
from lmkern.kernels.backends import Call

# A program holds whole rows in registers; beyond this width the backward's sums would not fit them.
MAX_WIDTH = 16384

# Elements a program works on at once: enough to keep its loads in flight where rows are short.
TILE = 2048

# Elements a thread holds of each of the backward's four tiles (x_hat, dy, dweight, dbias).
ELEMENTS_PER_THREAD = 16


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
        with torch.cuda.device_of(x):
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
    from lmkern.kernels.layer_norm import triton_kernels

    rows, width = x.shape
    options = constants(width)
    programs = min(-(-rows // options["BLOCK_R"]), persistent_programs(x, options["num_warps"]))
    dx = torch.empty((rows, width), dtype=x.dtype, device=x.device) if needs[0] else None
    dweight, dbias = (
        torch.empty((programs, width), dtype=torch.float32, device=x.device) if need else None
        for need in needs[1:]
    )
    if programs and any(needs):
        with torch.cuda.device_of(x):
            triton_kernels.backward_kernel[(programs,)](
                dy, dy.stride(0), x, x.stride(0), weight, mean, rstd, dx, dweight, dbias, rows, width, **options
            )  # fmt: skip
    return dx, None if dweight is None else dweight.sum(0), None if dbias is None else dbias.sum(0)


def constants(width: int) -> dict[str, int]:
    """The compile-time arguments of both kernels for rows of this width."""
    block_e = 1 << (width - 1).bit_length()
    block_r = max(1, TILE // block_e)
    # AMD's limit is 1024 threads of 64 a warp.
    num_warps = min(32 if torch.version.hip is None else 16, max(4, block_e // (32 * ELEMENTS_PER_THREAD)))
    return {"BLOCK_R": block_r, "BLOCK_E": block_e, "num_warps": num_warps}


def persistent_programs(x: Tensor, num_warps: int) -> int:
    """Programs that are resident at once at 16 warps a multiprocessor, which 128 registers a thread allow."""
    return triton_runtime.processors(x.device) * max(1, 16 // num_warps)
