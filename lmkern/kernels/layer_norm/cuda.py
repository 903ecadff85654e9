"""Layer norm on NVIDIA GPUs: csrc/layer_norm/cuda_*.cu, called through csrc/layer_norm/params.hpp."""

from __future__ import annotations

import struct

from torch import Tensor

from lmkern.kernels import cuda_call
from lmkern.kernels.backends import Call
from lmkern.kernels.cpu_call import DTYPE_CODES, pointer, statistics_dtype

__all__ = ["NOTE", "RUN_ON_HARDWARE", "backward", "forward", "unavailable", "unsupported"]

# The GPU on which these kernels passed tests/kernels/test_cuda_layer_norm.py, and the commit of the benchmark
# result that shows them beside Triton's. None: nobody has run them, and an automatic choice leaves them out.
RUN_ON_HARDWARE: str | None = None

NOTE = cuda_call.note(RUN_ON_HARDWARE)

# LayerNormParams: 11 pointers; x_stride, dy_stride, rows, columns, chunks; eps; two dtypes, threads, device,
# stream.
_PARAMS = struct.Struct("=11q 5q d 5q")

# Columns are counted in 32 bits, with room for a step of a block beyond the last.
_MAX_WIDTH = 2**30

# Blocks of the backward: two of up to 512 threads are resident on a processor at 64 registers a thread; fewer
# if a block would have less than so many rows.
_BLOCKS_PER_PROCESSOR = 2
_MIN_BLOCK_ROWS = 4


def unavailable() -> str | None:
    if reason := cuda_call.unavailable():
        return reason if RUN_ON_HARDWARE else f"{reason}; its kernels have not been run on a GPU yet"
    return None


def unsupported(call: Call) -> str | None:
    if reason := cuda_call.unsupported(call, RUN_ON_HARDWARE):
        return reason
    x, weight, bias = (call.tensors.get(name) for name in ("x", "weight", "bias"))
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        return f"takes weight and bias of one dtype; got {weight.dtype} and {bias.dtype}"
    if x is not None and not 1 <= x.shape[1] <= _MAX_WIDTH:
        return f"takes rows of 1 to 2^30 elements; got {x.shape[1]}"
    return None


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape)
    mean = x.new_empty(x.shape[0], dtype=statistics_dtype(x))
    rstd = mean.new_empty(x.shape[0])
    pointers = (x, weight, bias, y, mean, rstd, None, None, None, None, None)
    parameter = weight if weight is not None else bias
    cuda_call.module().layer_norm_forward(
        _PARAMS.pack(
            *(pointer(tensor) for tensor in pointers),
            x.stride(0),
            0,
            *x.shape,
            0,
            eps,
            *_context(x, parameter),
        )
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
    rows, columns = x.shape
    dx = x.new_empty(x.shape) if needs[0] else None
    dweight = mean.new_empty(columns) if needs[1] else None
    dbias = mean.new_empty(columns) if needs[2] else None
    chunks = max(1, min(_BLOCKS_PER_PROCESSOR * cuda_call.processors(x.device), rows // _MIN_BLOCK_ROWS))
    partials = mean.new_empty(chunks, 2, columns) if needs[1] or needs[2] else None
    pointers = (x, weight, None, None, mean, rstd, dy, dx, partials, dweight, dbias)
    cuda_call.module().layer_norm_backward(
        _PARAMS.pack(
            *(pointer(tensor) for tensor in pointers),
            x.stride(0),
            dy.stride(0),
            rows,
            columns,
            chunks,
            0.0,
            *_context(x, weight),
        )
    )
    return dx, dweight, dbias


def _context(x: Tensor, parameter: Tensor | None) -> tuple[int, int, int, int, int]:
    """dtype, parameter_dtype, threads (which only the CPU reads), device, stream."""
    code = DTYPE_CODES[x.dtype]
    parameter_code = code if parameter is None else DTYPE_CODES[parameter.dtype]
    return code, parameter_code, 0, *cuda_call.device_and_stream(x)
