"""Rotary positions in eager torch: the specification that every other backend is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from lmkern.kernels.anywhere import unavailable, unsupported
from lmkern.kernels.rotary.layout import empty_like

__all__ = ["backward", "forward", "unavailable", "unsupported"]


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
    tokens, pairs = x.shape[2], cos.shape[1]
    at = slice(offset, offset + tokens) if positions is None else positions
    dtype = torch.promote_types(x.dtype, torch.float32)
    c, s = (table[at].to(dtype) for table in (cos, sin))  # (N, pairs) or (B, N, pairs)
    if positions is not None:
        c, s = c[:, None], s[:, None]
    if inverse:
        s = -s
    turning = x[..., : 2 * pairs].to(dtype)
    x1, x2 = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
    y1, y2 = x1 * c - x2 * s, x2 * c + x1 * s
    y = torch.stack((y1, y2), dim=-1).flatten(-2) if interleaved else torch.cat((y1, y2), dim=-1)
    out = x if inplace else empty_like(x)
    out[..., 2 * pairs :] = x[..., 2 * pairs :]
    out[..., : 2 * pairs] = y
    return out


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
