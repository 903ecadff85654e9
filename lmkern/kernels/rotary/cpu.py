"""Rotary positions on the CPU: csrc/rotary/cpu_forward.cpp, called through csrc/rotary/params.hpp."""

from __future__ import annotations

import struct

from torch import Tensor

from lmkern.kernels import native
from lmkern.kernels.cpu_call import DTYPE_CODES, on_huge_pages, pointer, unavailable, unsupported
from lmkern.kernels.rotary.layout import empty_like

__all__ = ["backward", "forward", "unavailable", "unsupported"]

# RotaryParams: 5 pointers; 3 + 3 strides; 4 sizes, pairs; table_stride, offset; interleaved, inverse; dtype,
# threads.
_PARAMS = struct.Struct("=5q 6q 5q 2q 2q 2q")


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
    source = x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
    y = x if inplace and source is x else on_huge_pages(empty_like(x))
    native.function("rotary_forward", x.dtype)(
        _PARAMS.pack(
            *(pointer(tensor) for tensor in (source, y, cos, sin, positions)),
            *source.stride()[:3],
            *y.stride()[:3],
            *x.shape,
            cos.shape[1],
            cos.stride(0),
            offset,
            interleaved,
            inverse,
            DTYPE_CODES[x.dtype],
            native.threads(),
        )
    )
    return x.copy_(y) if inplace and y is not x else y


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
