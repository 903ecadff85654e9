"""Attention over a cache in eager torch: the specification that every other backend is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from lmkern.kernels.anywhere import unavailable, unsupported
from lmkern.kernels.autocast import outside_autocast
from lmkern.kernels.cached_attention.options import Options
from lmkern.kernels.statistics import wide

__all__ = ["forward", "unavailable", "unsupported"]


@outside_autocast
def forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    B, H, N_q, _ = q.shape
    k, v = (_keys(cache, options.page_table) for cache in (k_cache, v_cache))  # (B, H_kv, N_max, D)
    key = torch.arange(k.shape[2], device=q.device)  # (N_max,)
    if options.lengths is None:
        lengths = key.new_full((B, 1), k.shape[2])
    else:
        lengths = options.lengths[:, None].to(key.dtype)  # (B, 1)
    position = lengths - N_q + torch.arange(N_q, device=q.device)  # (B, N_q)
    seen = key <= position[..., None]  # (B, N_q, N_max)
    if options.left is not None:
        seen &= key >= position[..., None] - options.left
    # What no query sees may be anything, and 0 * NaN is NaN.
    unseen = ~seen.any(1)[:, None, :, None]  # (B, 1, N_max, 1)
    k, v = (wide(x).masked_fill(unseen, 0.0).repeat_interleave(H // x.shape[1], 1) for x in (k, v))

    scores = wide(q) @ k.mT * options.softmax_scale  # (B, H, N_q, N_max)
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.alibi_slopes is not None:
        distance = (position[:, None, :, None] - key).to(scores.dtype)  # (B, 1, N_q, N_max)
        scores = scores - options.alibi_slopes[:, None, None] * distance
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    if options.sinks is not None:
        sinks = options.sinks[:, None, None].expand(B, H, N_q, 1)
        lse = torch.cat((scores, sinks), -1).logsumexp(-1)  # (B, H, N_q)
    else:
        lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.empty_like(q).copy_(weights @ v), lse


def _keys(cache: Tensor, page_table: Tensor | None) -> Tensor:
    """(B, H_kv, N_max, D) of a cache, its pages in order; an entry that is no page gives page 0."""
    if page_table is None:
        return cache
    index = page_table.where((page_table >= 0) & (page_table < cache.shape[0]), 0).long()
    pages = cache[index]  # (B, max_pages, H_kv, page_size, D)
    return pages.transpose(1, 2).flatten(2, 3)
