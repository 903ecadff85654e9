"""Attention on the CPU: csrc/attention/cpu_*.cpp, called through csrc/attention/params.hpp."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from lmkern.kernels import cpu_call, native
from lmkern.kernels.attention import Options
from lmkern.kernels.backends import Call
from lmkern.kernels.cpu_call import pointer, unavailable

__all__ = ["backward", "forward", "unavailable", "unsupported"]

MAX_HEAD_DIM = 256

# AttentionParams: 10 pointers, 8 tensors' strides, 6 sizes; has_diagonal, diagonal; softmax_scale; dtype,
# threads.
_PARAMS = struct.Struct("=10q 32q 6q 2q d 2q")
_NO_STRIDES = (0, 0, 0, 0)


def unsupported(call: Call) -> str | None:
    q = call.tensors["q"]
    if q is not None and q.shape[3] > MAX_HEAD_DIM:
        return f"takes head_dim up to {MAX_HEAD_DIM}; got {q.shape[3]}"
    options: Options | None = call.options.get("options")
    return cpu_call.unsupported(call) or (None if options is None else _not_taken_yet(options))


def _not_taken_yet(options: Options) -> str | None:
    features = {
        "a sliding window": options.left,
        "softcap": options.softcap or None,
        "dropout": options.dropout_p or None,
        "bias": options.bias,
        "mask": options.mask,
        "relative_bias": options.relative_bias,
        "sinks": options.sinks,
        "packed documents": options.cu_seqlens_q,
    }
    given = [name for name, value in features.items() if value is not None]
    return f"does not take {' and '.join(given)} yet" if given else None


def _diagonal(options: Options, q: Tensor, k: Tensor) -> int | None:
    """Query i sees the keys j <= i + diagonal; None: all."""
    if options.right is None:
        return None
    return options.right + (0 if options.top_left else k.shape[2] - q.shape[2])


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=cpu_call.statistics_dtype(q))
    native.module().attention_forward(
        _pack(
            q, k, v, out, lse, None, None, None, None, None, _diagonal(options, q, k), options.softmax_scale
        )
    )
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
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    dq, dk, dv = (torch.empty_like(x) if need else None for x, need in zip((q, k, v), needs[:3], strict=True))
    dlse = None if dlse is None else dlse.contiguous()
    native.module().attention_backward(
        _pack(
            q,
            k,
            v,
            out,
            lse.contiguous(),
            dout,
            dlse,
            dq,
            dk,
            dv,
            _diagonal(options, q, k),
            options.softmax_scale,
        )
    )
    return dq, dk, dv, None, None, None


def _pack(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    diagonal: int | None,
    softmax_scale: float,
) -> bytes:
    strides = (_NO_STRIDES if x is None else x.stride() for x in (q, k, v, out, dout, dq, dk, dv))
    return _PARAMS.pack(
        *(pointer(x) for x in (q, k, v, out, lse, dout, dlse, dq, dk, dv)),
        *(stride for tensor in strides for stride in tensor),
        *q.shape[:2],
        k.shape[1],
        q.shape[2],
        k.shape[2],
        q.shape[3],
        diagonal is not None,
        diagonal or 0,
        softmax_scale,
        cpu_call.DTYPE_CODES[q.dtype],
        native.threads(),
    )
