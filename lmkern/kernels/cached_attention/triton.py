"""Attention over a cache on GPUs through Triton: grids, tile sizes and allocation.

Keys are taken in ranges of a fixed size, each by a program of its own, and a second kernel puts the ranges
together in their order: many programs for one query, and the same bits every time, in every batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmkern.kernels import triton_runtime, tuning
from lmkern.kernels.backends import Call
from lmkern.kernels.cached_attention.options import Options
from lmkern.kernels.triton_runtime import unavailable

__all__ = ["NOTE", "constants", "forward", "unavailable", "unsupported"]

NOTE = triton_runtime.NOTE

MAX_HEAD_DIM = 256

# Keys of a range. 4096 keys of 8 key/value heads are 128 programs, about one a multiprocessor of the largest
# GPUs. A query's partial results take a 256th of the bytes of the keys and values in bfloat16.
SPLIT = 256

# (BLOCK_N, num_warps, num_stages) by (bytes an element, BLOCK_D): a block of keys of at most 32 KB.
TILES = {
    (2, 16): (128, 4, 3), (2, 32): (128, 4, 3), (2, 64): (128, 4, 3),
    (2, 128): (64, 4, 3), (2, 256): (32, 4, 3),
    (4, 16): (64, 4, 3), (4, 32): (64, 4, 3), (4, 64): (64, 4, 2),
    (4, 128): (32, 4, 2), (4, 256): (16, 4, 2),
}  # fmt: skip

# Rows, the queries of all heads that share a key, of a program: a matrix product takes at least 16.
ROWS = (16, 64)

# Ranges that combine_kernel takes at once.
BLOCK_S = 16


def unsupported(call: Call) -> str | None:
    if reason := triton_runtime.unsupported(call, float64=False):
        return reason
    q = call.tensors.get("q")
    if q is not None and q.shape[3] > MAX_HEAD_DIM:
        return f"takes head_dim up to {MAX_HEAD_DIM}; got {q.shape[3]}"
    return None


def forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    from lmkern.kernels.cached_attention import triton_kernels

    B, H, N_q, D = q.shape
    H_kv, page_size = k_cache.shape[1:3]
    table = options.page_table
    N_max = page_size if table is None else page_size * table.shape[1]
    out = torch.empty_like(q)
    lse = q.new_empty((B, H, N_q), dtype=torch.float32)
    if not lse.numel():
        return out, lse
    splits = -(-N_max // SPLIT)
    sums = lse.new_empty((B, H, N_q, splits, D))
    row_max, row_sum = (lse.new_empty((B, H, N_q, splits)) for _ in range(2))
    rows = H // H_kv * N_q
    grain, (q_, k_, v_, out_) = triton_runtime.strided(q, k_cache, v_cache, out)
    chosen = constants(q.device, q.dtype.itemsize, D, ROWS[rows > ROWS[0]])
    block_d = chosen["BLOCK_D"]
    # A bound beyond every key fits 32 bits.
    left = None if options.left is None else min(options.left, N_max)
    with triton_runtime.device_of(q):
        if splits:
            triton_kernels.split_kernel[(B * H_kv, splits, -(-rows // chosen["BLOCK_M"]))](
                *q_, *k_, *v_,
                sums, row_max, row_sum, options.lengths,
                table, 0 if table is None else table.stride(0), k_cache.shape[0], page_size,
                options.alibi_slopes, H, H_kv, N_q, N_max, splits,
                left, options.softmax_scale, options.softcap or None, D=D, GRAIN=grain, SPLIT=SPLIT, **chosen,
            )  # fmt: skip
        triton_kernels.combine_kernel[(B * H * N_q,)](
            *out_, lse, sums, row_max, row_sum, options.sinks, H, N_q, splits,
            D=D, GRAIN=grain, BLOCK_S=BLOCK_S, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return out, lse


@tuning.remembered
def constants(device: torch.device, itemsize: int, head_dim: int, block_m: int) -> dict[str, Any]:
    """The compile-time arguments and launch options of the kernel that takes a range of keys."""
    block_d = max(16, 1 << (head_dim - 1).bit_length())
    block_n, num_warps, num_stages = TILES[itemsize, block_d]
    default = {"BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}
    shape_class = f"{itemsize}-{block_d}-{block_m}"
    architecture = tuning.architecture(device)
    return {
        "BLOCK_M": block_m,
        "BLOCK_D": block_d,
        **tuning.lookup("cached_attention", "split", architecture, shape_class, default),
    }
