"""Attention on the CPU: csrc/attention/cpu_*.cpp, called through csrc/attention/params.hpp."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from lmkern.kernels import cpu_call, native
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
    return cpu_call.unsupported(call)


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, diagonal: int | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=cpu_call.statistics_dtype(q))
    native.module().attention_forward(
        _pack(q, k, v, out, lse, None, None, None, None, None, diagonal, softmax_scale)
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
    *,
    diagonal: int | None,
    softmax_scale: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dq, dk, dv = (torch.empty_like(x) if need else None for x, need in zip((q, k, v), needs, strict=True))
    dlse = None if dlse is None else dlse.contiguous()
    native.module().attention_backward(
        _pack(q, k, v, out, lse.contiguous(), dout, dlse, dq, dk, dv, diagonal, softmax_scale)
    )
    return dq, dk, dv


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
