"""Attention on Hopper GPUs: csrc/attention/cuda_*.cu, called through csrc/attention/cuda.hpp."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from lmkern.kernels import cuda_call
from lmkern.kernels.attention import Options
from lmkern.kernels.attention.cpu import _pack
from lmkern.kernels.backends import Call
from lmkern.kernels.cpu_call import pointer

__all__ = ["NOTE", "RUN_ON_HARDWARE", "forward", "unavailable", "unsupported"]

# The GPU on which these kernels passed their tests. None: nobody has run them, and an automatic choice
# leaves them out.
RUN_ON_HARDWARE: str | None = None

NOTE = cuda_call.note(RUN_ON_HARDWARE)

MAX_HEAD_DIM = 256

# kQueries of csrc/attention/cuda_backward.cu.
_QUERIES = 64

# CudaAttentionParams, after AttentionParams: delta, dq_sum, turns; processors, device, stream.
_MORE = struct.Struct("=3q 3q")


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    packed = _pack({"q": q, "k": k, "v": v, "out": out, "lse": lse}, options)
    cuda_call.module().attention_forward(packed + _more(q))
    return out, lse


def _more(q: Tensor, *workspaces: Tensor | None) -> bytes:
    pointers = [pointer(x) for x in (*workspaces, None, None, None)[:3]]
    return _MORE.pack(*pointers, cuda_call.processors(q.device), *cuda_call.device_and_stream(q))


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
    dq, dk, dv = (torch.empty_like(x) if need else None for x, need in zip((q, k, v), needs[:3], strict=True))
    delta = torch.empty_like(lse)
    dq_sum = turns = None
    if dq is not None:
        blocks = -(-q.shape[2] // _QUERIES)
        if options.cu_seqlens_q is not None:
            blocks = q.shape[2] // _QUERIES + options.cu_seqlens_q.numel() - 1
        heads, width = q.shape[0] * q.shape[1], 64 if q.shape[3] <= 64 else 128
        dq_sum = lse.new_zeros(heads * blocks * _QUERIES * width)
        turns = torch.zeros(heads * blocks, dtype=torch.int32, device=q.device)
    tensors = {
        "q": q, "k": k, "v": v, "out": out, "lse": lse.contiguous(), "dout": dout,
        "dlse": None if dlse is None else dlse.contiguous(), "dq": dq, "dk": dk, "dv": dv,
    }  # fmt: skip
    cuda_call.module().attention_backward(_pack(tensors, options) + _more(q, delta, dq_sum, turns))
    return dq, dk, dv, None, None, None
