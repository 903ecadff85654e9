"""Attention on the CPU: csrc/attention/cpu_*.cpp, called through csrc/attention/params.hpp."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from lmkern.kernels import cpu_call, native
from lmkern.kernels.attention import Options
from lmkern.kernels.attention.few_queries import as_cache
from lmkern.kernels.attention.sinks import sink_gradient
from lmkern.kernels.backends import Call
from lmkern.kernels.cached_attention import cpu as cached_attention
from lmkern.kernels.cpu_call import on_huge_pages, unavailable
from lmkern.kernels.philox import threshold
from lmkern.kernels.statistics import statistics_dtype

__all__ = ["backward", "forward", "unavailable", "unsupported"]

MAX_HEAD_DIM = 256

# AttentionParams: 18 pointers; 11 tensors' strides; 6 sizes, sequences; left, right, top_left;
# relative_radius, relative_head_stride; dropout_threshold, seed; softmax_scale, softcap; exact_lse;
# dtype, bias_dtype, threads.
_PARAMS = struct.Struct("=18q 44q 7q 3q 2q 2q 2d 4q")
_NO_STRIDES = (0, 0, 0, 0)
_UNBOUNDED = 1 << 40  # kUnbounded


def unsupported(call: Call) -> str | None:
    q = call.tensors["q"]
    if q is not None and q.shape[3] > MAX_HEAD_DIM:
        return f"takes head_dim up to {MAX_HEAD_DIM}; got {q.shape[3]}"
    return cpu_call.unsupported(call)


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    if (cached := as_cache(q, k, options)) is not None:
        return cached_attention.forward(q, k, v, cached)
    out = on_huge_pages(torch.empty_like(q))
    lse = q.new_empty(q.shape[:3], dtype=statistics_dtype(q))
    native.function("attention_forward", q.dtype)(pack(options, q, k, v, out, lse))
    return out, lse


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
    needs: tuple[bool, bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    dq, dk, dv = (
        on_huge_pages(torch.empty_like(x)) if need else None
        for x, need in zip((q, k, v), needs[:3], strict=True)
    )
    wide = statistics_dtype(q)
    sequences, heads = _sequences(q, options), q.shape[1]
    dbias = drelative = None
    if needs[3] and options.bias is not None:
        dbias = options.bias.new_zeros(options.bias.shape, dtype=wide)
    if needs[4] and options.relative_bias is not None:
        # A part for each sequence and query head, so that none is added to by two threads.
        drelative = q.new_zeros((sequences, heads, options.relative_bias.shape[1]), dtype=torch.float64)
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    native.function("attention_backward", q.dtype)(
        pack(options, q, k, v, out, lse, dout, dlse, dq, dk, dv, dbias, drelative)
    )
    if drelative is not None and options.relative_bias is not None:
        drelative = drelative.sum(0)
        if options.relative_bias.shape[0] == 1:
            drelative = drelative.sum(0, keepdim=True)
        drelative = drelative.to(wide)
    if dbias is not None and options.bias is not None:
        dbias = dbias.to(options.bias.dtype)
    dsinks = None
    if needs[5] and options.sinks is not None:
        dsinks = sink_gradient(dout, out, lse, dlse, options.sinks)
    return dq, dk, dv, dbias, drelative, dsinks


def pack(
    options: Options,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    dbias: Tensor | None = None,
    drelative_bias: Tensor | None = None,
) -> bytes:
    """AttentionParams, whose pointers are of what lives until the call is made."""
    batch, heads, n_q, head_dim = q.shape
    _, heads_kv, n_k, _ = k.shape
    bias, relative = options.bias, options.relative_bias
    pointers = [
        0 if x is None else x.data_ptr()
        for x in (
            q, k, v, out, lse, dout, dlse, dq, dk, dv, bias, options.mask, relative,
            options.sinks, dbias, drelative_bias, options.cu_seqlens_q, options.cu_seqlens_k,
        )
    ]  # fmt: skip
    strides: list[int] = []
    for x in (q, k, v, out, dout, dq, dk, dv):
        strides += _NO_STRIDES if x is None else x.stride()
    for x in (bias, options.mask, dbias):
        strides += _NO_STRIDES if x is None else _broadcast_strides(x, (batch, heads, n_q, n_k))
    levels = threshold(options.dropout_p)
    return _PARAMS.pack(
        *pointers,
        *strides,
        batch,
        heads,
        heads_kv,
        n_q,
        n_k,
        head_dim,
        _sequences(q, options),
        _UNBOUNDED if options.left is None else options.left,
        _UNBOUNDED if options.right is None else options.right,
        options.top_left,
        0 if relative is None else relative.shape[1] // 2,
        0 if relative is None or relative.shape[0] == 1 else relative.shape[1],
        levels,
        int(options.seed.item()) if levels and options.seed is not None else 0,
        options.softmax_scale,
        options.softcap,
        options.exact_lse,
        cpu_call.DTYPE_CODES[q.dtype],
        0 if bias is None else cpu_call.DTYPE_CODES[bias.dtype],
        native.threads(),
    )


def _sequences(q: Tensor, options: Options) -> int:
    return q.shape[0] if options.cu_seqlens_q is None else options.cu_seqlens_q.numel() - 1


def _broadcast_strides(x: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """x's strides, 0 along the dimensions in which it is broadcast to shape."""
    return tuple(
        0 if size == 1 and full != 1 else stride
        for size, full, stride in zip(x.shape, shape, x.stride(), strict=True)
    )
