"""Biases that depend on how far a key stands from a query alone: the vectors that `attention` adds to scores.

Both give (H, 2 R + 1) with R = max(n_q, n_k) - 1: element R + j - p is for the key j of the query at position
p, as `lmkern.attention(relative_bias=...)` takes it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmkern.ops.dispatch import flag, takes_tensors


@takes_tensors
def alibi(slopes: Tensor, n_q: int, n_k: int) -> Tensor:
    """-slope * |j - p|, differentiable in slopes (H,). Press et al. 2022, arXiv:2108.12409."""
    if slopes.dim() != 1:
        raise ValueError(f"alibi: slopes must be (H,); got {tuple(slopes.shape)}")
    return -slopes[:, None] * _distances(n_q, n_k, slopes.device).abs()


def bucketed_bias(
    table: Tensor, n_q: int, n_k: int, *, bidirectional: bool, max_distance: int = 128
) -> Tensor:
    """T5's bias, differentiable in table (buckets, H): each distance takes the row of its bucket.

    Half of the buckets hold one distance each, the others hold logarithmically more up to max_distance, and
    the last one all beyond. bidirectional: half of the buckets are for the keys behind the query; without it
    those share the bucket of distance 0. T5 itself has softmax_scale 1. Raises ValueError where buckets are
    too few, or reach max_distance one by one.

    Raffel et al. 2020, arXiv:1910.10683.
    """
    bidirectional = flag("bucketed_bias", "bidirectional", bidirectional)
    if table.dim() != 2:
        raise ValueError(f"bucketed_bias: table must be (buckets, H); got {tuple(table.shape)}")
    buckets = table.shape[0] // 2 if bidirectional else table.shape[0]
    exact = buckets // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"bucketed_bias: expected at least {4 if bidirectional else 2} buckets and max_distance beyond "
            f"the {exact} that hold one distance each; got table {tuple(table.shape)} (buckets, H) and "
            f"max_distance {max_distance}"
        )
    offsets = _distances(n_q, n_k, table.device)
    distances = offsets.abs() if bidirectional else (-offsets).clamp(min=0)
    share = torch.log(distances.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    logarithmic = exact + (share * (buckets - exact)).long()
    index = torch.where(distances < exact, distances, logarithmic.clamp(max=buckets - 1))
    if bidirectional:
        index = index + buckets * (offsets > 0)
    return table[index].T


def _distances(n_q: int, n_k: int, device: torch.device) -> Tensor:
    """j - p from -R to R."""
    reach = max(n_q, n_k, 1) - 1
    return torch.arange(-reach, reach + 1, device=device)
