"""Attention of the newest tokens over a cache of keys and values: the step of generation."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from lmkern.kernels import backends
from lmkern.kernels.cached_attention import Options
from lmkern.kernels.checked import checked
from lmkern.kernels.statistics import statistics_dtype
from lmkern.ops import attention_checks as checks
from lmkern.ops.dispatch import checked_softcap, direct, flag, int32, takes_tensors, wants_gradient
from lmkern.ops.registration import call_registered


@takes_tensors
def cached_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    lengths: Tensor | None = None,
    page_table: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softmax_scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of the newest tokens of each sequence over all of its keys, for inference.

    q: (B, H, N_q, D), the newest N_q tokens. k_cache, v_cache: (B, H_kv, N_max, D) with H a multiple of H_kv,
        any strides. float32, float16, bfloat16 or float64, all of one dtype and on one device.
    lengths: (B,) int32 or int64, how many keys of each sequence are in use, those of the newest tokens
        included; None: all N_max. What lies behind them is not read.
    page_table: (B, max_pages) int32 or int64. The caches are then pages (pages, H_kv, page_size, D), and key
        j of sequence b is row j % page_size of page page_table[b, j // page_size]; N_max is
        max_pages * page_size. Entries past the keys in use may be anything.
    window: (left, right) as in `attention`; query i stands at p = length - N_q + i and sees the keys
        p - left <= j <= p. A bound on the right changes nothing.
    softmax_scale: default 1 / sqrt(D). softcap: c * tanh(s / c) of the scores; None or 0: as they are.
    alibi_slopes: (H,), -slope * (p - j) is added. sinks: (H,) scores of a key beside all others whose value
        is zero; part of lse.
    return_lse: also return the log-sum-exp of each query's scores, (B, H, N_q).
    backend: "triton", "cpu" or "reference"; default the fastest that applies.

    Returns (B, H, N_q, D) in q's dtype, laid out as q is; the bits of a sequence depend neither on the
    threads nor on the rest of the batch. A query before the first key (length < N_q) gives zeros. Raises
    ValueError for shapes, dtypes and devices, for lengths and pages out of range (on a GPU with
    LMKERN_CHECKED=1), and where a gradient would be wanted: take `attention` then. UnsupportedBackend if the
    named backend cannot run this here.
    """
    name = "cached_attention"
    return_lse = flag(name, "return_lse", return_lse)
    _check(q, k_cache, v_cache, lengths, page_table, alibi_slopes, sinks)
    q, k_cache, v_cache = checks.cast(name, q, k_cache, v_cache, "q, k_cache and v_cache")
    left, _ = checks.checked_band(name, window, causal=True)
    cap = checked_softcap(name, softcap)
    alibi_slopes = _per_head("alibi_slopes", alibi_slopes, q)
    sinks = _per_head("sinks", sinks, q)
    scale = 1.0 / math.sqrt(q.shape[3]) if softmax_scale is None else float(softmax_scale)
    tensors = (q, k_cache, v_cache, lengths, page_table, alibi_slopes, sinks)
    call = _forward if direct(*tensors) else partial(call_registered, "cached_attention")
    out, lse = call(*tensors, left, scale, cap, backend)
    return (out, lse) if return_lse else out


def _forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | None,
    page_table: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    left: int | None,
    softmax_scale: float,
    softcap: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    # Here and not in the function above: a compiler knows no numbers.
    _check_range(q, k_cache, lengths, page_table)
    options = Options(
        softmax_scale, _indices(lengths), _indices(page_table), left, softcap, sinks, alibi_slopes
    )
    call = backends.Call(
        "cached_attention", {"q": q, "k_cache": k_cache, "v_cache": v_cache}, {"options": options}, backend
    )
    return backends.select(call).forward(q, k_cache, v_cache, options)  # type: ignore[no-any-return]


@torch.library.custom_op("lmkern::cached_attention", mutates_args=())
def _cached_attention_op(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | None,
    page_table: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    left: int | None,
    softmax_scale: float,
    softcap: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    return _forward(
        q, k_cache, v_cache, lengths, page_table, alibi_slopes, sinks, left, softmax_scale, softcap, backend
    )


@_cached_attention_op.register_fake
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | None,
    page_table: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    left: int | None,
    softmax_scale: float,
    softcap: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=statistics_dtype(q))


def _fail(what: str, got: object) -> None:
    raise ValueError(f"cached_attention: {what}; got {got}")


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | None,
    page_table: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> None:
    """ValueError in words for what no backend can make sense of."""

    def fail(what: str) -> None:
        _fail(what, f"q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}")

    if not (q.dim() == k_cache.dim() == v_cache.dim() == 4):
        fail("q, k_cache and v_cache must be (B, H, N, D), or pages (pages, H, page_size, D)")
    if k_cache.shape != v_cache.shape:
        fail("k_cache and v_cache must have one shape")
    if q.shape[3] != k_cache.shape[3] or q.shape[3] < 1:
        fail("q, k_cache and v_cache must share head_dim")
    if q.shape[1] != k_cache.shape[1] and (k_cache.shape[1] == 0 or q.shape[1] % k_cache.shape[1]):
        fail("the number of query heads must be a multiple of the key/value heads")
    if page_table is None and q.shape[0] != k_cache.shape[0]:
        fail("q, k_cache and v_cache must share the batch size unless a page_table is given")
    for name, x, dimensions in (("lengths", lengths, 1), ("page_table", page_table, 2)):
        if x is None:
            continue
        if x.dim() != dimensions or x.shape[0] != q.shape[0]:
            _fail(
                f"{name} must be {('(B,)', '(B, max_pages)')[dimensions - 1]}, B = {q.shape[0]}",
                tuple(x.shape),
            )
        if x.dtype not in (torch.int32, torch.int64):
            _fail(f"{name} must be int32 or int64", x.dtype)
    if page_table is not None and k_cache.shape[2] == 0:
        fail("pages must hold at least one key each")
    tensors = {"k_cache": k_cache, "v_cache": v_cache, "lengths": lengths, "page_table": page_table}
    for name, x in tensors.items():
        if x is not None:
            checks.check_device("cached_attention", name, x, q)
    if wants_gradient(q, k_cache, v_cache, alibi_slopes, sinks):
        _fail(
            "there is no gradient; call it under torch.no_grad() or inference_mode(), or take attention",
            "an input that requires one",
        )


def _check_range(q: Tensor, k_cache: Tensor, lengths: Tensor | None, page_table: Tensor | None) -> None:
    """ValueError for lengths and pages out of range, where `checked` says that they are looked at."""
    rows = k_cache.shape[2]
    N_max = rows if page_table is None else rows * page_table.shape[1]
    if lengths is not None and lengths.numel() and checked(lengths):
        least, most = (int(x) for x in lengths.aminmax())
        if least < 0 or most > N_max:
            _fail(f"lengths must lie in [0, {N_max}]", f"{least} to {most}")
    if page_table is None or not page_table.numel() or not checked(page_table):
        return
    least, most = (int(x) for x in page_table.aminmax())
    if least >= 0 and most < k_cache.shape[0]:
        return
    used = page_table.shape[1] if lengths is None else (lengths[:, None] + rows - 1) // rows  # (B, 1)
    wrong = (page_table < 0) | (page_table >= k_cache.shape[0])
    wrong &= torch.arange(page_table.shape[1], device=page_table.device) < used
    if wrong.any():
        b, j = wrong.nonzero()[0].tolist()
        _fail(
            f"page_table must hold pages in [0, {k_cache.shape[0]}) up to each sequence's length",
            f"{int(page_table[b, j])} at ({b}, {j})",
        )


def _per_head(name: str, x: Tensor | None, q: Tensor) -> Tensor | None:
    """(H,) as the contract takes it."""
    return None if x is None else checks.checked_per_head("cached_attention", name, x, q).detach()


def _indices(x: Tensor | None) -> Tensor | None:
    """int32, the elements of a row next to each other. On a CPU those that are used were looked at."""
    if x is None:
        return None
    x = x.to(torch.int32) if x.is_cpu else int32(x)
    return x if x.dim() == 2 and x.stride(1) == 1 else x.contiguous()
