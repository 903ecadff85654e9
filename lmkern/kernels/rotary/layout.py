"""How the result of a rotation lies in memory."""

from __future__ import annotations

from torch import Tensor


def empty_like(x: Tensor) -> Tensor:
    """Memory for x (B, H, N, D): heads and tokens in the order in which x has them, without gaps."""
    B, H, N, D = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(B, N, H, D).transpose(1, 2)
    return x.new_empty(B, H, N, D)
