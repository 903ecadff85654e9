"""Attention in eager torch: the specification that every other backend is compared with.

Float32 and float64 inputs are computed in their own type, float16 and bfloat16 in float32. It holds the
(N_q, N_k) scores, and packed documents are a loop.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lmkern.kernels.anywhere import unavailable, unsupported
from lmkern.kernels.attention import Options
from lmkern.kernels.autocast import outside_autocast
from lmkern.kernels.philox import keep_mask, keep_scale, threshold
from lmkern.kernels.statistics import wide

__all__ = ["attention", "backward", "forward", "unavailable", "unsupported"]

# The sequence's number, as dropout counts (that of the first one of a batch), and its queries and keys.
Sequence = tuple[int, slice, slice]


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    out, lse = attention(q, k, v, options)
    return torch.empty_like(q).copy_(out), lse.contiguous()


@outside_autocast
def attention(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """The differentiable formula: differentiable twice, and in everything that the contract says.

    v may have a width D_v of its own. Returns out (B, H, N_q, D_v) in q's dtype and lse (B, H, N_q).
    """
    results = [
        _attend(q[:, :, queries], k[:, :, keys], v[:, :, keys], options, number)
        for number, queries, keys in _sequences(options)
    ]
    out, lse = (x[0] if len(x) == 1 else torch.cat(x, 2) for x in zip(*results, strict=True))
    return out.to(q.dtype), lse


@outside_autocast
def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    options: Options,
    *,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    dout = wide(dout)
    delta = (dout * wide(out)).sum(-1)  # (B, H, N_q)
    if dlse is not None:
        delta = delta - dlse
    inputs = (q, k, v, options.bias, options.relative_bias, options.sinks)
    sums = tuple(
        torch.zeros_like(x, dtype=dout.dtype) if x is not None and need else None
        for x, need in zip(inputs, needs, strict=True)
    )
    for number, queries, keys in _sequences(options):
        dq, dk, dv, *others = sums
        _add_gradients(
            (_part(dq, queries), _part(dk, keys), _part(dv, keys), *others),
            dout[:, :, queries], q[:, :, queries], k[:, :, keys], v[:, :, keys],
            delta[:, :, queries], options, number,
        )  # fmt: skip
    return tuple(
        None if x is None or g is None else torch.empty_like(x).copy_(g)
        for x, g in zip(inputs, sums, strict=True)
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, options: Options, number: int) -> tuple[Tensor, Tensor]:
    """out and lse of sequences that are not packed."""
    scores = _scores(_capped(q, k, options), options)  # (B, H, N_q, N_k)
    weights, _, lse = _softmax(scores, options)
    if (keep := _keep(weights, options, number)) is not None:
        weights = weights * keep
    return weights @ _repeat_heads(wide(v), q.shape[1]), lse


def _add_gradients(
    sums: tuple[Tensor | None, ...],
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor,
    options: Options,
    number: int,
) -> None:
    """Adds what sequences that are not packed give to dq, dk, dv, dbias, drelative_bias and dsinks."""
    dq, dk, dv, dbias, drelative_bias, dsinks = sums
    heads, heads_kv = q.shape[1], k.shape[1]
    capped = _capped(q, k, options)
    weights, sink_weights, _ = _softmax(_scores(capped, options), options)
    if dsinks is not None:
        dsinks -= (sink_weights * delta).sum((0, 2))
    dweights = dout @ _repeat_heads(wide(v), heads).mT  # (B, H, N_q, N_k)
    kept = weights
    if (keep := _keep(weights, options, number)) is not None:
        kept, dweights = weights * keep, dweights * keep
    if dv is not None:
        dv += _sum_heads(kept.mT @ dout, heads_kv)
    dscores = weights * (dweights - delta[..., None])  # (B, H, N_q, N_k)
    if dbias is not None:
        dbias += dscores.sum_to_size(dbias.shape)
    if drelative_bias is not None:
        diagonals = _offsets(dscores, options) + drelative_bias.shape[1] // 2  # (N_q, N_k)
        rows = dscores.sum(0).flatten(1).sum_to_size(drelative_bias.shape[0], diagonals.numel())
        drelative_bias.index_add_(1, diagonals.flatten(), rows)
    if options.softcap:
        dscores = dscores * (1 - (capped / options.softcap) ** 2)
    dscores = dscores * options.softmax_scale
    if dq is not None:
        dq += dscores @ _repeat_heads(wide(k), heads)
    if dk is not None:
        dk += _sum_heads(dscores.mT @ wide(q), heads_kv)


def _capped(q: Tensor, k: Tensor, options: Options) -> Tensor:
    """softcap(q . k * softmax_scale), (B, H, N_q, N_k)."""
    scores = wide(q) @ _repeat_heads(wide(k), q.shape[1]).mT * options.softmax_scale
    return options.softcap * torch.tanh(scores / options.softcap) if options.softcap else scores


def _scores(capped: Tensor, options: Options) -> Tensor:
    """With the biases; -inf where a query does not see a key."""
    scores, offsets = capped, _offsets(capped, options)
    hidden = torch.zeros_like(offsets, dtype=torch.bool)
    if options.left is not None:
        hidden = hidden | (offsets < -options.left)
    if options.right is not None:
        hidden = hidden | (offsets > options.right)
    if options.mask is not None:
        hidden = hidden | ~options.mask
    if options.bias is not None:
        scores = scores + options.bias
        hidden = hidden | (options.bias == -torch.inf)
    if options.relative_bias is not None:
        relative = options.relative_bias[:, offsets + options.relative_bias.shape[1] // 2]
        scores = scores + relative
        hidden = hidden | (relative == -torch.inf)
    # A fill, because -inf as a sum has NaN for a gradient.
    return scores.masked_fill(hidden, -torch.inf)


def _offsets(scores: Tensor, options: Options) -> Tensor:
    """j - p, how far each key stands behind each query: (N_q, N_k)."""
    n_q, n_k = scores.shape[2:]
    position = torch.arange(n_q, device=scores.device) + (0 if options.top_left else n_k - n_q)
    return torch.arange(n_k, device=scores.device) - position[:, None]


def _softmax(scores: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of the keys (B, H, N_q, N_k) and of the sink (B, H, N_q), and lse (B, H, N_q).

    A row that sees nothing has weights of 0 and lse = -inf. The weights are not exp(scores - lse): of scores
    of a billion lse holds no log of their number.
    """
    N_k = scores.shape[3]
    sinks = scores.new_full((), -torch.inf) if options.sinks is None else options.sinks[:, None, None]
    beside = torch.cat((scores, sinks.expand(*scores.shape[:3], 1)), -1)
    # The gradients of both would be NaN where every score is -inf.
    blind = (beside == -torch.inf).all(-1)
    seen = beside.masked_fill(blind[..., None], 0.0)
    weights = seen.softmax(-1).masked_fill(blind[..., None], 0.0)
    return weights[..., :N_k], weights[..., N_k], seen.logsumexp(-1).masked_fill(blind, -torch.inf)


def _keep(weights: Tensor, options: Options, number: int) -> Tensor | None:
    """What dropout multiplies the weights by; None without it."""
    if options.seed is None or not threshold(options.dropout_p):
        return None
    mask = keep_mask(options.seed, options.dropout_p, weights.shape, outermost=number)
    return mask.to(weights.dtype) * keep_scale(options.dropout_p)


def _sequences(options: Options) -> Iterator[Sequence]:
    """Each packed document; a batch of sequences that are not packed is taken at once."""
    if options.cu_seqlens_q is None or options.cu_seqlens_k is None:
        yield 0, slice(None), slice(None)
        return
    queries, keys = options.cu_seqlens_q.tolist(), options.cu_seqlens_k.tolist()
    if len(queries) == 1:
        yield 0, slice(0), slice(0)
    for number in range(len(queries) - 1):
        yield number, slice(*queries[number : number + 2]), slice(*keys[number : number + 2])


def _part(x: Tensor | None, tokens: slice) -> Tensor | None:
    return None if x is None else x[:, :, tokens]


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(B, H_kv, N, D) to (B, H, N, D): each key/value head serves H / H_kv query heads in a row."""
    return x.repeat_interleave(heads // x.shape[1], 1) if x.shape[1] != heads else x


def _sum_heads(x: Tensor, heads_kv: int) -> Tensor:
    """The transpose of `_repeat_heads`."""
    return x.unflatten(1, (heads_kv, -1)).sum(2) if x.shape[1] != heads_kv else x
