"""Copies on the CPU: csrc/copy/cpu_*.cpp, called through csrc/copy/params.hpp."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from lmkern.kernels import native
from lmkern.kernels.cpu_call import DTYPE_CODES, on_huge_pages, unavailable, unsupported

__all__ = ["backward", "forward", "unavailable", "unsupported"]

# CopyParams: 2 pointers; 2 strides; 3 sizes; transposed, two dtypes, threads.
_PARAMS = struct.Struct("=2q 2q 3q 4q")


def forward(x: Tensor, *, dtype: torch.dtype, transposed: bool) -> Tensor:
    if not transposed:
        y = on_huge_pages(torch.empty_like(x, dtype=dtype))
        # In the order of memory, where both have the same; else row by row.
        if x.stride() == y.stride():
            _call(x, y, (0, 0, 1, 1, x.numel()), transposed=False)
        else:
            rows = _rows(x.contiguous())
            _call(rows, y, _layout(rows), transposed=False)
        return y
    y = on_huge_pages(x.new_empty(*x.mT.shape, dtype=dtype))
    if x.dim() > 2 and x.mT.is_contiguous():
        # The transposed order is already there.
        _call(x, y, (0, 0, 1, 1, x.numel()), transposed=False)
    else:
        rows = _rows(x)
        _call(rows, y, _layout(rows), transposed=True)
    return y


def backward(dy: Tensor, *, dtype: torch.dtype, transposed: bool) -> Tensor:
    return forward(dy, dtype=dtype, transposed=transposed)


def _rows(x: Tensor) -> Tensor:
    """x as (B, R, C), the elements of a row next to each other."""
    x = x.reshape(-1, *x.shape[-2:]) if x.dim() > 3 else x.reshape((1,) * (3 - x.dim()) + x.shape)
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _layout(rows: Tensor) -> tuple[int, ...]:
    """batch_stride, row_stride, batch, rows and columns of (B, R, C)."""
    return (*rows.stride()[:2], *rows.shape)


def _call(x: Tensor, y: Tensor, layout: tuple[int, ...], *, transposed: bool) -> None:
    """x: its first element, of those that layout says."""
    native.function("copy_forward", x.dtype)(
        _PARAMS.pack(
            x.data_ptr(),
            y.data_ptr(),
            *layout,
            transposed,
            DTYPE_CODES[x.dtype],
            DTYPE_CODES[y.dtype],
            native.threads(),
        )
    )
