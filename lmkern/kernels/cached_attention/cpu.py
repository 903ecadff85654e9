"""Attention over a cache on the CPU: csrc/cached_attention, called through its params.hpp."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from lmkern.kernels import cpu_call, native
from lmkern.kernels.cached_attention.options import Options
from lmkern.kernels.cpu_call import pointer, unavailable, unsupported
from lmkern.kernels.statistics import statistics_dtype

__all__ = ["forward", "unavailable", "unsupported"]

# CachedAttentionParams: 10 pointers; 4 tensors' strides; 6 sizes; page_size, page_table_stride, split, left;
# softmax_scale, softcap; dtype, threads.
_PARAMS = struct.Struct("=10q 16q 6q 4q 2d 2q")

# Keys of a range that one task takes. Fixed, so that the result does not depend on the threads.
_SPLIT = 512
# What the kernel rounds head_dim up to in its partial results.
_WIDTH_STEP = 16


def forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    B, H, N_q, D = q.shape
    table, H_kv, rows = options.page_table, k_cache.shape[1], k_cache.shape[2]
    N_max = rows if table is None else rows * table.shape[1]
    out = torch.empty_like(q)
    lse = q.new_empty((B, H, N_q), dtype=statistics_dtype(q))
    width = 2 + -(-D // _WIDTH_STEP) * _WIDTH_STEP
    partials = lse.new_empty(B * -(-N_max // _SPLIT) * H * N_q * width)
    native.function("cached_attention_forward", q.dtype)(
        _PARAMS.pack(
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            out.data_ptr(),
            lse.data_ptr(),
            pointer(options.lengths),
            pointer(table),
            pointer(options.sinks),
            pointer(options.alibi_slopes),
            partials.data_ptr(),
            *q.stride(),
            *k_cache.stride(),
            *v_cache.stride(),
            *out.stride(),
            B,
            H,
            H_kv,
            N_q,
            N_max,
            D,
            0 if table is None else rows,
            0 if table is None else table.stride(0),
            _SPLIT,
            -1 if options.left is None else options.left,
            options.softmax_scale,
            options.softcap,
            cpu_call.DTYPE_CODES[q.dtype],
            native.threads(),
        )
    )
    return out, lse
