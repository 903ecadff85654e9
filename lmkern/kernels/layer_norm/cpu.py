"""Layer norm on the CPU: csrc/layer_norm/cpu_*.cpp, called through csrc/layer_norm/params.hpp."""

from __future__ import annotations

import struct

from torch import Tensor

from lmkern.kernels import cpu_call, native
from lmkern.kernels.backends import Call
from lmkern.kernels.cpu_call import pointer, unavailable

__all__ = ["backward", "forward", "unavailable", "unsupported"]

# LayerNormParams: 11 pointers; x_stride, dy_stride, rows, columns, chunks; eps; two dtypes, threads, device,
# stream.
_PARAMS = struct.Struct("=11q 5q d 5q")

# Rows are summed for dweight and dbias in at most so many chunks of at least so many rows: a function of the
# shape alone, so that the result does not depend on the threads.
_MAX_CHUNKS = 64
_MIN_CHUNK_ROWS = 16


def unsupported(call: Call) -> str | None:
    return cpu_call.unsupported(call)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape)
    mean = x.new_empty(x.shape[0], dtype=cpu_call.statistics_dtype(x))
    rstd = mean.new_empty(x.shape[0])
    pointers = (x, weight, bias, y, mean, rstd, None, None, None, None, None)
    parameter = weight if weight is not None else bias
    native.module().layer_norm_forward(
        _PARAMS.pack(
            *(pointer(tensor) for tensor in pointers),
            x.stride(0),
            0,
            *x.shape,
            0,
            eps,
            *_dtypes(x, parameter),
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
    chunks = max(1, min(_MAX_CHUNKS, rows // _MIN_CHUNK_ROWS))
    partials = mean.new_empty(chunks, 2, columns)
    pointers = (x, weight, None, None, mean, rstd, dy, dx, partials, dweight, dbias)
    native.module().layer_norm_backward(
        _PARAMS.pack(
            *(pointer(tensor) for tensor in pointers),
            x.stride(0),
            dy.stride(0),
            rows,
            columns,
            chunks,
            0.0,
            *_dtypes(x, weight),
        )
    )
    return dx, dweight, dbias


def _dtypes(x: Tensor, parameter: Tensor | None) -> tuple[int, int, int, int, int]:
    """dtype, parameter_dtype, threads, and the two fields that only CUDA reads."""
    code = cpu_call.DTYPE_CODES[x.dtype]
    parameter_code = code if parameter is None else cpu_call.DTYPE_CODES[parameter.dtype]
    return code, parameter_code, native.threads(), 0, 0
