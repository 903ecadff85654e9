"""Scaled dot-product attention as a differentiable function."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmkern.kernels.attention import Options, reference
from lmkern.ops import attention_checks as checks
from lmkern.ops.attention_autograd import attend
from lmkern.ops.dispatch import checked_softcap, flag, takes_tensors
from lmkern.ops.relative_bias import alibi


@takes_tensors
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softmax_scale: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    relative_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(softcap(q @ k^T * softmax_scale) + biases) @ v, never materialising the scores.

    q: (B, H, N_q, D); k, v: (B, H_kv, N_k, D) with H a multiple of H_kv. float32, float16, bfloat16 or
        float64, one device, any strides.
    softmax_scale: default 1 / sqrt(D).

    Which keys are seen; the last query stands at the last key, query i at p = i + N_k - N_q:
    causal: query i sees the keys j <= p.
    window: (left, right), the keys p - left <= j <= p + right; None: no bound. causal makes right 0.
    mask: boolean, True: seen; broadcasts to (B, H, N_q, N_k).
    cu_seqlens: (documents + 1,) int32 or int64. B is 1, and document s holds the tokens cu_seqlens[s] to
        cu_seqlens[s + 1], maybe none. Each is a sequence of its own for everything that is said here. Without
        bias and mask. cu_seqlens_k: the same for keys, default cu_seqlens.

    What is added to the scores, each differentiable:
    bias: broadcasts to (B, H, N_q, N_k); -inf hides a key.
    relative_bias: (H or 1, 2 R + 1), element R + j - p; R >= max(N_q, N_k) - 1. `bucketed_bias` makes T5's.
    alibi_slopes: (H,), -slope * |j - p|.

    softcap: c * tanh(s / c) of the scores before the biases; None or 0: as they are.
    sinks: (H,) scores of a key beside all others whose value is zero; differentiable, and part of lse.
    dropout_p: probability with which a weight is zeroed, in units of 2^-16; the others are scaled by
        1 / (1 - dropout_p). dropout_seed: () int64 on q's device, the same mask for the same seed on every
        backend; default drawn from torch's generator.
    return_lse: also return the log-sum-exp of each query's scores, (B, H, N_q), differentiable. In bfloat16
        on a CPU the last bits of out may be others then.
    backend: "cuda", "triton", "cpu" or "reference"; default the fastest that applies.

    Returns (B, H, N_q, D) in q's dtype, laid out as q is. A query with no visible key gives zeros (lse -inf
    without a sink) and zero gradients. Under autocast q, k and v are taken in its dtype. Differentiable twice
    in eager mode; the second derivative holds the scores. Raises ValueError for shapes, dtypes and devices,
    and for the numbers in cu_seqlens where they are on the CPU or LMKERN_CHECKED=1; UnsupportedBackend if the
    named backend cannot run this here.

    Vaswani et al. 2017, arXiv:1706.03762; online softmax as in Dao et al. 2022, arXiv:2205.14135.
    """
    name = "attention"
    return_lse = flag(name, "return_lse", return_lse)
    checks.check_shapes(name, q, k, v)
    q, k, v = checks.cast(name, q, k, v)
    scores = (*q.shape[:3], k.shape[2])
    queries, keys = checks.checked_lengths(name, cu_seqlens, cu_seqlens_k, q, k)
    if queries is not None and (bias is not None or mask is not None):
        raise ValueError(f"{name}: bias and mask do not go with cu_seqlens; take relative_bias or window")
    if bias is not None:
        bias = checks.checked_bias(name, "bias", bias, q, scores)
    if mask is not None:
        mask = checks.checked_mask(name, "mask", mask, q, scores)
    if alibi_slopes is not None:
        alibi_slopes = checks.checked_per_head(name, "alibi_slopes", alibi_slopes, q)
    if relative_bias is not None:
        relative_bias = checks.checked_relative_bias(name, relative_bias, q, k.shape[2])
    if sinks is not None:
        sinks = checks.checked_per_head(name, "sinks", sinks, q)
    left, right = checks.checked_band(name, window, flag(name, "causal", causal))
    dropout_p, seed = checks.checked_dropout(name, dropout_p, dropout_seed, q)
    options = Options(
        softmax_scale=_scale(q, softmax_scale),
        left=left,
        right=right,
        softcap=checked_softcap(name, softcap),
        dropout_p=dropout_p,
        exact_lse=return_lse,
        seed=seed,
        bias=bias,
        mask=mask,
        relative_bias=_with_alibi(relative_bias, alibi_slopes, q.shape[2], k.shape[2]),
        sinks=sinks,
        cu_seqlens_q=queries,
        cu_seqlens_k=keys,
    )
    out, lse = attend(q, k, v, options, backend)
    return (out, lse) if return_lse else out


@takes_tensors
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, argument for argument, on lmkern's kernels.

    is_causal is torch's: query i sees keys j <= i, counted from the first query and the first key
    (`attention` counts from the last). A query that sees no key gives zeros, with every kind of mask. Values
    of another width than the keys are served by the reference, which holds the scores.
    """
    name = "scaled_dot_product_attention"
    is_causal, enable_gqa = flag(name, "is_causal", is_causal), flag(name, "enable_gqa", enable_gqa)
    if attn_mask is not None and is_causal:
        raise ValueError(f"{name}: give attn_mask or is_causal=True, not both; got both")
    if query.dim() < 2 or key.dim() != query.dim() or value.dim() != query.dim():
        raise ValueError(
            f"{name}: query, key and value must be (..., N, D) of equal rank; "
            f"got {checks.shapes(query, key, value)}"
        )
    lead = query.shape[:-2]
    scores = (*query.shape[:-1], key.shape[-2])
    q, k, v = (_four_dimensional(x) for x in (query, key, value))
    checks.check_shapes(name, q, k, v, grouped=enable_gqa, same_width=False)
    q, k, v = checks.cast(name, q, k, v)
    bias = mask = None
    if attn_mask is not None:
        if attn_mask.dtype != torch.bool and not attn_mask.dtype.is_floating_point:
            raise ValueError(
                f"{name}: attn_mask must be boolean (True: seen) or floating (added); got {attn_mask.dtype}"
            )
        check = checks.checked_mask if attn_mask.dtype == torch.bool else checks.checked_bias
        if query.dim() > 4:
            checks.check_broadcast(name, "attn_mask", attn_mask, scores)
            attn_mask, scores = attn_mask.broadcast_to(scores).flatten(0, -4), (*q.shape[:3], k.shape[2])
        checked = check(name, "attn_mask", attn_mask, q, scores)
        bias, mask = (None, checked) if attn_mask.dtype == torch.bool else (checked, None)
    dropout_p, seed = checks.checked_dropout(name, dropout_p, None, q)
    options = Options(
        softmax_scale=_scale(q, scale),
        right=0 if is_causal else None,
        top_left=is_causal,
        dropout_p=dropout_p,
        exact_lse=False,
        seed=seed,
        bias=bias,
        mask=mask,
    )
    if v.shape[-1] == q.shape[-1]:
        out, _ = attend(q, k, v, options, None)
    else:
        out, _ = reference.attention(q, k, v, options)
    return out.reshape(*lead, *out.shape[-2:])


def _with_alibi(relative_bias: Tensor | None, slopes: Tensor | None, n_q: int, n_k: int) -> Tensor | None:
    if slopes is None:
        return relative_bias
    if relative_bias is None:
        return alibi(slopes, n_q, n_k)
    tokens = relative_bias.shape[1] // 2 + 1
    return relative_bias + alibi(slopes, tokens, tokens)


def _scale(q: Tensor, softmax_scale: float | None) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else float(softmax_scale)


def _four_dimensional(x: Tensor) -> Tensor:
    """(..., N, D) as (B, H, N, D): a view where the leading dimensions allow it."""
    if x.dim() == 4:
        return x
    if x.dim() < 4:
        return x[(None,) * (4 - x.dim())]
    return x.flatten(0, -4)
