"""Embedding in eager torch: the specification that every other backend is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from lmkern.kernels.anywhere import unavailable, unsupported
from lmkern.kernels.checked import check_range

__all__ = ["backward", "forward", "unavailable", "unsupported"]


def forward(tokens: Tensor, weight: Tensor) -> Tensor:
    check_range("embedding", "tokens", tokens, weight.shape[0])
    return weight.index_select(0, tokens)


def backward(dy: Tensor, tokens: Tensor, *, vocabulary: int, padding_idx: int) -> Tensor:
    dtype = torch.promote_types(dy.dtype, torch.float32)
    dweight = dy.new_zeros(vocabulary, dy.shape[1], dtype=dtype)
    dweight.index_add_(0, tokens, dy.to(dtype))
    if 0 <= padding_idx < vocabulary:
        dweight[padding_idx] = 0
    return dweight.to(dy.dtype)
