"""Embedding on the CPU: csrc/embedding/cpu_*.cpp, called through csrc/embedding/params.hpp."""

from __future__ import annotations

import struct

from torch import Tensor

from lmkern.kernels import native
from lmkern.kernels.cpu_call import DTYPE_CODES, on_huge_pages, pointer, unavailable, unsupported

__all__ = ["backward", "forward", "unavailable", "unsupported"]

# EmbeddingParams: 7 pointers; dy_stride, count, columns, vocabulary, padding_idx, dtype, threads.
_PARAMS = struct.Struct("=7q 7q")


def forward(tokens: Tensor, weight: Tensor) -> Tensor:
    y = on_huge_pages(weight.new_empty(tokens.shape[0], weight.shape[1]))
    native.function("embedding_forward", weight.dtype)(
        _PARAMS.pack(
            tokens.data_ptr(),
            weight.data_ptr(),
            y.data_ptr(),
            *(0,) * 5,
            *y.shape,
            weight.shape[0],
            -1,
            DTYPE_CODES[weight.dtype],
            native.threads(),
        )
    )
    return y


def backward(dy: Tensor, tokens: Tensor, *, vocabulary: int, padding_idx: int) -> Tensor:
    dweight = on_huge_pages(dy.new_empty(vocabulary, dy.shape[1]))
    starts, order = tokens.new_empty(vocabulary + 1), tokens.new_empty(tokens.shape)
    pointers = (tokens, None, None, dy, dweight, starts, order)
    native.function("embedding_backward", dy.dtype)(
        _PARAMS.pack(
            *(pointer(tensor) for tensor in pointers),
            dy.stride(0),
            *dy.shape,
            vocabulary,
            padding_idx,
            DTYPE_CODES[dy.dtype],
            native.threads(),
        )
    )
    return dweight
