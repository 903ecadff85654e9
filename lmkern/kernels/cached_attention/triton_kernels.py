"""The Triton kernels of attention over a cache. Imported on first use by triton.py, which launches them."""

# Triton compiles these functions; annotations would be read as types of arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton.language as tl

from lmkern.kernels.attention.triton_parts import dot, exp, unit_of
from lmkern.kernels.triton_kernels import rounded, tanh
from lmkern.kernels.triton_launch import kernel

# Values that change from call to call: a kernel is not compiled again for them.
RUNTIME = [
    "H", "H_kv", "N_q", "N_max", "splits", "pages", "page_size", "stride_table", "left",
    "softmax_scale", "softcap",
    *(f"stride_{tensor}{dimension}" for tensor in "qkvo" for dimension in "bhn"),
]  # fmt: skip


@kernel(do_not_specialize=RUNTIME)
def split_kernel(
    q_ptr, stride_qb, stride_qh, stride_qn, stride_qd,  # (B, H, N_q, D)
    k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,  # (B, H_kv, N_max or page_size, D)
    v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,
    sums_ptr,  # (B, H, N_q, splits, D) float32
    row_max_ptr, row_sum_ptr,  # (B, H, N_q, splits) float32
    lengths_ptr,  # (B,); None: N_max each
    table_ptr, stride_table, pages, page_size,  # None without pages
    alibi_ptr,  # (H,) or None
    H, H_kv, N_q, N_max, splits,
    left, softmax_scale, softcap,  # left, softcap: None without
    D: tl.constexpr,
    GRAIN: tl.constexpr,  # elements that strides but the last are counted in
    SPLIT: tl.constexpr,  # keys of a program, a multiple of BLOCK_N
    BLOCK_M: tl.constexpr,  # rows: the queries of all heads that share a key
    BLOCK_N: tl.constexpr,  # keys
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per range of SPLIT keys; grid (B * H_kv, splits, ceil(H / H_kv * N_q / BLOCK_M)).

    Leaves the softmax of its range as row_max, row_sum and the sums of weighted values, for combine_kernel.
    Ranges begin at multiples of SPLIT whatever the cache holds, so a result has the same bits in every batch.
    """
    batch, head_kv = tl.program_id(0) // H_kv, tl.program_id(0) % H_kv
    split = tl.program_id(1)
    rows = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = H // H_kv
    there = rows < group * N_q
    heads, queries = head_kv * group + rows // N_q, rows % N_q
    columns = tl.arange(0, BLOCK_D)
    unit: tl.constexpr = unit_of(q_ptr.dtype.element_ty, False)

    n = N_max
    if lengths_ptr is not None:
        n = tl.minimum(tl.maximum(tl.load(lengths_ptr + batch), 0), N_max)
    positions = n - N_q + queries
    first = split * 0
    if left is not None:
        first = tl.maximum(n - N_q - left, 0)
    start = tl.maximum(split * SPLIT, first // BLOCK_N * BLOCK_N)
    stop = tl.minimum((split + 1) * SPLIT, n)

    q_rows = (
        batch.to(tl.int64) * stride_qb + heads.to(tl.int64) * stride_qh + queries.to(tl.int64) * stride_qn
    ) * GRAIN
    q_inside = there[:, None] & (columns < D)[None, :]
    q = tl.load(q_ptr + q_rows[:, None] + columns[None, :] * stride_qd, mask=q_inside, other=0.0)
    if alibi_ptr is not None:
        slopes = tl.load(alibi_ptr + heads, mask=there, other=0.0) * unit

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first_key in range(start, stop, BLOCK_N):
        keys = first_key + tl.arange(0, BLOCK_N)
        used = (keys >= first) & (keys < stop)
        if table_ptr is not None:
            entries = table_ptr + batch.to(tl.int64) * stride_table + keys // page_size
            holder = tl.load(entries, mask=used, other=0)
            holder = tl.where((holder >= 0) & (holder < pages), holder, 0).to(tl.int64)
            places = (keys % page_size).to(tl.int64)
        else:
            holder = batch.to(tl.int64)
            places = keys.to(tl.int64)
        inside = used[:, None] & (columns < D)[None, :]
        k_rows = (holder * stride_kb + head_kv.to(tl.int64) * stride_kh + places * stride_kn) * GRAIN
        k = tl.load(k_ptr + k_rows[:, None] + columns[None, :] * stride_kd, mask=inside, other=0.0)
        scores = dot(q, tl.trans(k), None)
        if softcap is not None:
            scores = tanh(scores * softmax_scale / softcap) * (softcap * unit)
        else:
            scores = scores * (softmax_scale * unit)
        distance = positions[:, None] - keys[None, :]
        if alibi_ptr is not None:
            scores -= slopes[:, None] * distance.to(tl.float32)
        seen = used[None, :] & (distance >= 0)
        if left is not None:
            seen = seen & (distance <= left)
        scores = tl.where(seen, scores, float("-inf"))

        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # Without a visible key new_max = -inf, and -inf - -inf would be NaN.
        subtract = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = exp(scores - subtract[:, None], unit)
        rescale = exp(row_max - subtract, unit)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        v_rows = (holder * stride_vb + head_kv.to(tl.int64) * stride_vh + places * stride_vn) * GRAIN
        v = tl.load(v_ptr + v_rows[:, None] + columns[None, :] * stride_vd, mask=inside, other=0.0)
        acc = dot(rounded(weights, v.dtype), v, acc * rescale[:, None])
        row_max = new_max

    results = ((batch.to(tl.int64) * H + heads) * N_q + queries) * splits + split
    tl.store(row_max_ptr + results, row_max, mask=there)
    tl.store(row_sum_ptr + results, row_sum, mask=there)
    # combine_kernel does not read the sums of a range without a visible key.
    q_inside = q_inside & (row_sum != 0.0)[:, None]
    tl.store(sums_ptr + results[:, None] * D + columns[None, :], acc, mask=q_inside)


@kernel(do_not_specialize=RUNTIME)
def combine_kernel(
    out_ptr, stride_ob, stride_oh, stride_on, stride_od,  # (B, H, N_q, D)
    lse_ptr,  # (B, H, N_q), contiguous
    sums_ptr,  # (B, H, N_q, splits, D) float32
    row_max_ptr, row_sum_ptr,  # (B, H, N_q, splits) float32
    sinks_ptr,  # (H,) or None
    H, N_q, splits,
    D: tl.constexpr,
    GRAIN: tl.constexpr,  # elements that strides but the last are counted in
    BLOCK_S: tl.constexpr,  # ranges
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One softmax of the ranges' own, in their order; grid (B * H * N_q,)."""
    row = tl.program_id(0).to(tl.int64)
    batch, head, query = row // N_q // H, row // N_q % H, row % N_q
    columns = tl.arange(0, BLOCK_D)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    unit: tl.constexpr = unit_of(dtype, False)

    total_max = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, splits, BLOCK_S):
        ranges = first + tl.arange(0, BLOCK_S)
        places = row * splits + ranges
        row_max = tl.load(row_max_ptr + places, mask=ranges < splits, other=float("-inf"))
        row_sum = tl.load(row_sum_ptr + places, mask=ranges < splits, other=0.0)
        inside = (row_sum != 0.0)[:, None] & (columns < D)[None, :]
        sums = tl.load(sums_ptr + places[:, None] * D + columns[None, :], mask=inside, other=0.0)
        new_max = tl.maximum(total_max, tl.max(row_max, 0))
        subtract = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = exp(row_max - subtract, unit)
        rescale = exp(total_max - subtract, unit)
        total = total * rescale + tl.sum(weights * row_sum, 0)
        acc = acc * rescale + tl.sum(weights[:, None] * sums, 0)
        total_max = new_max
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head) * unit
        new_max = tl.maximum(total_max, sink)
        subtract = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale = exp(total_max - subtract, unit)
        total = total * rescale + exp(sink - subtract, unit)
        acc = acc * rescale
        total_max = new_max

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), total_max / unit + tl.log(total))
    tl.store(lse_ptr + row, lse)
    out = out_ptr + (batch * stride_ob + head * stride_oh + query * stride_on) * GRAIN
    tl.store(out + columns * stride_od, rounded(acc / total, dtype), mask=columns < D)
