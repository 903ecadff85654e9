"""Activations on the CPU: csrc/activation/cpu_*.cpp, called through csrc/activation/params.hpp."""

from __future__ import annotations

import struct

from torch import Tensor

from lmkern.kernels import cpu_call, native
from lmkern.kernels.activation import FUNCTIONS
from lmkern.kernels.cpu_call import on_huge_pages, pointer, unavailable, unsupported
from lmkern.kernels.statistics import statistics_dtype

__all__ = ["backward", "forward", "unavailable", "unsupported"]

# ActivationParams: 7 pointers; x_stride, dy_stride, rows, columns, chunks; function, gated, dtype, threads.
_PARAMS = struct.Struct("=7q 9q")

# enum class Function in csrc/activation/params.hpp.
FUNCTION_CODES = {name: code for code, name in enumerate(FUNCTIONS)}

# Rows are summed for dbias in at most so many chunks of at least so many rows: a function of the shape alone,
# so that the result does not depend on the threads.
_MAX_CHUNKS = 64
_MIN_CHUNK_ROWS = 16


def forward(x: Tensor, bias: Tensor | None, *, function: str, gated: bool) -> Tensor:
    rows, width = x.shape
    y = on_huge_pages(x.new_empty(rows, width // 2 if gated else width))
    native.function("activation_forward", x.dtype)(
        _PARAMS.pack(
            x.data_ptr(),
            pointer(bias),
            y.data_ptr(),
            *(0,) * 4,
            x.stride(0),
            0,
            *y.shape,
            0,
            *_context(x, function, gated),
        )
    )
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
    rows, width = x.shape
    chunks = max(1, min(_MAX_CHUNKS, rows // _MIN_CHUNK_ROWS))
    dx = on_huge_pages(x.new_empty(rows, width)) if needs[0] else None
    dbias = x.new_empty(width, dtype=statistics_dtype(x)) if needs[1] else None
    partials = dbias.new_empty(chunks, width) if dbias is not None else None
    pointers = (x, bias, None, dy, dx, partials, dbias)
    native.function("activation_backward", x.dtype)(
        _PARAMS.pack(
            *(pointer(tensor) for tensor in pointers),
            x.stride(0),
            dy.stride(0),
            *dy.shape,
            chunks,
            *_context(x, function, gated),
        )
    )
    return dx, dbias


def _context(x: Tensor, function: str, gated: bool) -> tuple[int, int, int, int]:
    return FUNCTION_CODES[function], gated, cpu_call.DTYPE_CODES[x.dtype], native.threads()
