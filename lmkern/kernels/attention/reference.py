"""Attention in eager torch: the specification that every other backend is compared with.

Float32 and float64 inputs are computed in their own type, float16 and bfloat16 in float32. It holds the
(N_q, N_k) scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmkern.kernels.backends import Call


def unavailable() -> str | None:
    return None


def unsupported(call: Call) -> str | None:
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, diagonal: int | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = attention(q, k, v, diagonal=diagonal, softmax_scale=softmax_scale)
    return torch.empty_like(q, dtype=out.dtype).copy_(out) if q.shape == out.shape else out, lse


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    diagonal: int | None,
    softmax_scale: float,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The differentiable formula, which also takes what no kernel takes yet.

    mask: broadcast against (B, H, N_q, N_k); boolean (True: the key is seen) or added to the scores.
    dropout_p: probability with which a weight is zeroed; the others are scaled by 1 / (1 - dropout_p).
    Returns out (B, H, N_q, D_v) in q's dtype and lse (B, H, N_q).
    """
    scores = _scores(q, k, diagonal, softmax_scale, mask)  # (B, H, N_q, N_k)
    lse = scores.logsumexp(-1)  # (B, H, N_q)
    weights = _weights(scores, lse)  # (B, H, N_q, N_k)
    if dropout_p:
        weights = torch.nn.functional.dropout(weights, dropout_p)
    out = weights @ _repeat_heads(_wide(v), q.shape[1])  # (B, H, N_q, D_v)
    return out.to(q.dtype), lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    *,
    diagonal: int | None,
    softmax_scale: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    heads, heads_kv = q.shape[1], k.shape[1]
    dout_wide = _wide(dout)
    weights = _weights(_scores(q, k, diagonal, softmax_scale, None), lse)  # (B, H, N_q, N_k)
    dweights = dout_wide @ _repeat_heads(_wide(v), heads).mT  # (B, H, N_q, N_k)
    delta = (dout_wide * _wide(out)).sum(-1)  # (B, H, N_q)
    if dlse is not None:
        delta = delta - dlse
    dscores = weights * (dweights - delta[..., None]) * softmax_scale  # (B, H, N_q, N_k)
    dq = dscores @ _repeat_heads(_wide(k), heads) if needs[0] else None
    dk = _sum_heads(dscores.mT @ _wide(q), heads_kv) if needs[1] else None
    dv = _sum_heads(weights.mT @ dout_wide, heads_kv) if needs[2] else None
    wanted = ((dq, q), (dk, k), (dv, v))
    return tuple(None if g is None else torch.empty_like(x).copy_(g) for g, x in wanted)  # type: ignore[return-value]


def _scores(q: Tensor, k: Tensor, diagonal: int | None, softmax_scale: float, mask: Tensor | None) -> Tensor:
    """(B, H, N_q, N_k); -inf where a query does not see a key."""
    scores = _wide(q) @ _repeat_heads(_wide(k), q.shape[1]).mT * softmax_scale
    if diagonal is not None:
        query = torch.arange(q.shape[2], device=q.device)[:, None]
        key = torch.arange(k.shape[2], device=q.device)[None, :]
        scores = scores.masked_fill(key > query + diagonal, -torch.inf)
    if mask is not None:
        hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf
        if mask.dtype != torch.bool:
            scores = scores + mask
        # A fill, because the gradient of logsumexp is NaN where every score is -inf.
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """softmax(scores); a row without a visible key has lse = -inf and weights 0."""
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(B, H_kv, N, D) to (B, H, N, D): each key/value head serves H / H_kv query heads in a row."""
    return x.repeat_interleave(heads // x.shape[1], 1) if x.shape[1] != heads else x


def _sum_heads(x: Tensor, heads_kv: int) -> Tensor:
    """The transpose of `_repeat_heads`."""
    return x.unflatten(1, (heads_kv, -1)).sum(2) if x.shape[1] != heads_kv else x
