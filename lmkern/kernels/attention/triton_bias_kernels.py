"""The Triton kernels of the gradients of attention's biases. Imported on first use by triton.py."""

# Triton compiles these functions; annotations would be read as types of arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from lmkern.kernels.attention.triton_kernels import RUNTIME
from lmkern.kernels.attention.triton_parts import (
    biased,
    document,
    dot,
    exp,
    kept_anywhere,
    load,
    load_statistics,
    offset_of,
    scored,
    unit_of,
    visible,
)
from lmkern.kernels.triton_kernels import long
from lmkern.kernels.triton_launch import kernel


@triton.jit
def _gradients(
    batch, head, sequence, first_query, first_key, first_q, first_k, n_q, n_k, offset,
    q_ptr, stride_qb, stride_qh, stride_qn, stride_qd, k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,
    v_ptr, stride_vb, stride_vh, stride_vn, stride_vd, dout_ptr, stride_gb, stride_gh, stride_gn, stride_gd,
    lse_ptr, delta_ptr, bias_ptr, stride_bb, stride_bh, stride_bi, stride_bj,
    mask_ptr, stride_mb, stride_mh, stride_mi, stride_mj, relative_ptr, stride_rh, radius,
    seed_ptr, threshold, keep_scale, H, H_kv, N_q, left, right, softmax_scale, softcap,
    D: tl.constexpr, GRAIN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """weights * (dweights - delta) of BLOCK_M queries and BLOCK_N keys; 0 where a query does not see a key.

    first_key may be negative: what lies before the first key is not seen.
    """
    head_kv = head // (H // H_kv)
    q_ptr += offset_of(batch, stride_qb, head, stride_qh, first_q, stride_qn, GRAIN)
    k_ptr += offset_of(batch, stride_kb, head_kv, stride_kh, first_k, stride_kn, GRAIN)
    v_ptr += offset_of(batch, stride_vb, head_kv, stride_vh, first_k, stride_vn, GRAIN)
    dout_ptr += offset_of(batch, stride_gb, head, stride_gh, first_q, stride_gn, GRAIN)
    queries = first_query + tl.arange(0, BLOCK_M)
    keys = first_key + tl.arange(0, BLOCK_N)
    keys = tl.where(keys < 0, n_k, keys)
    unit: tl.constexpr = unit_of(q_ptr.dtype.element_ty, bias_ptr is not None or relative_ptr is not None)
    q = load(q_ptr, queries, n_q, stride_qn, stride_qd, D, BLOCK_D, GRAIN)
    dout = load(dout_ptr, queries, n_q, stride_gn, stride_gd, D, BLOCK_D, GRAIN)
    k = load(k_ptr, keys, n_k, stride_kn, stride_kd, D, BLOCK_D, GRAIN)
    v = load(v_ptr, keys, n_k, stride_vn, stride_vd, D, BLOCK_D, GRAIN)
    base = long(batch * H + head) * N_q + first_q
    lse, delta = load_statistics(lse_ptr, delta_ptr, base, queries, n_q, unit)
    scores, _ = scored(q, k, softmax_scale, softcap, SOFTCAP, unit)
    scores = biased(
        scores, queries[:, None], keys[None, :], n_q, n_k, offset, batch, head,
        bias_ptr, stride_bb, stride_bh, stride_bi, stride_bj,
        mask_ptr, stride_mb, stride_mh, stride_mi, stride_mj,
        relative_ptr, stride_rh, radius, unit,
    )  # fmt: skip
    seen = visible(queries[:, None], keys[None, :], n_q, n_k, offset, left, right, HAS_LEFT, HAS_RIGHT)
    scores = tl.where(seen, scores, float("-inf"))
    weights = exp(scores - lse[:, None], unit)
    dweights = dot(dout, tl.trans(v), None)
    if seed_ptr is not None:
        dweights *= kept_anywhere(
            seed_ptr, threshold, keep_scale, queries[:, None], keys[None, :], head, sequence
        )
    return tl.where(scores == float("-inf"), 0.0, weights * (dweights - delta[:, None]))


@kernel(do_not_specialize=[*RUNTIME, "batches", "heads", "rows", "columns", "B"])
def backward_dbias_kernel(
    dbias_ptr, batches, heads, rows, columns,  # (1 or B, 1 or H, 1 or N_q, 1 or N_k), contiguous, float32
    q_ptr, stride_qb, stride_qh, stride_qn, stride_qd,  # (B, H, N_q, D)
    k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,  # (B, H_kv, N_k, D)
    v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,  # (B, H_kv, N_k, D)
    dout_ptr, stride_gb, stride_gh, stride_gn, stride_gd,  # (B, H, N_q, D)
    lse_ptr, delta_ptr,  # (B, H, N_q), contiguous
    bias_ptr, stride_bb, stride_bh, stride_bi, stride_bj,
    mask_ptr, stride_mb, stride_mh, stride_mi, stride_mj,
    relative_ptr, stride_rh, radius,
    seed_ptr, threshold, keep_scale,
    B, H, H_kv, N_q, N_k, left, right, softmax_scale, softcap,
    D: tl.constexpr,
    GRAIN: tl.constexpr,  # elements that strides but the last are counted in
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    TOP_LEFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dbias, summed over the dimensions along which the bias is broadcast. One program per tile of the bias.

    Grid (batches * heads * ceil(rows / BLOCK_M) * ceil(columns / BLOCK_N),). A tile has one owner, which goes
    over the broadcast dimensions in their order: no atomics, and no memory beyond the result.
    """
    row_blocks, column_blocks = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    program = tl.program_id(0)
    column_block, program = program % column_blocks, program // column_blocks
    row_block, program = program % row_blocks, program // row_blocks
    own_head, own_batch = program % heads, program // heads
    offset = 0
    if not TOP_LEFT:
        offset = N_k - N_q
    # Where the bias has one element for all, the owner visits all.
    all_batches, all_heads = batches < B, heads < H
    all_rows, all_columns = rows < N_q, columns < N_k
    tile = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for batch in range(tl.where(all_batches, 0, own_batch), tl.where(all_batches, B, own_batch + 1)):
        for head in range(tl.where(all_heads, 0, own_head), tl.where(all_heads, H, own_head + 1)):
            first_row = tl.where(all_rows, 0, row_block * BLOCK_M)
            last_row = tl.where(all_rows, N_q, first_row + BLOCK_M)
            for first_query in range(first_row, last_row, BLOCK_M):
                first_column = tl.where(all_columns, 0, column_block * BLOCK_N)
                last_column = tl.where(all_columns, N_k, first_column + BLOCK_N)
                for first_key in range(first_column, last_column, BLOCK_N):
                    tile += _gradients(
                        batch, head, batch, first_query, first_key, 0, 0, N_q, N_k, offset,
                        q_ptr, stride_qb, stride_qh, stride_qn, stride_qd,
                        k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,
                        v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,
                        dout_ptr, stride_gb, stride_gh, stride_gn, stride_gd, lse_ptr, delta_ptr,
                        bias_ptr, stride_bb, stride_bh, stride_bi, stride_bj,
                        mask_ptr, stride_mb, stride_mh, stride_mi, stride_mj, relative_ptr, stride_rh, radius,
                        seed_ptr, threshold, keep_scale, H, H_kv, N_q, left, right, softmax_scale, softcap,
                        D, GRAIN, HAS_LEFT, HAS_RIGHT, SOFTCAP, BLOCK_M, BLOCK_N, BLOCK_D,
                    )  # fmt: skip
    i = tl.arange(0, BLOCK_M)[:, None]
    j = tl.arange(0, BLOCK_N)[None, :]
    if all_rows:
        tile = tl.where(i == 0, tl.sum(tile, 0, keep_dims=True), 0.0)
    if all_columns:
        tile = tl.where(j == 0, tl.sum(tile, 1, keep_dims=True), 0.0)
    i += row_block * BLOCK_M
    j += column_block * BLOCK_N
    dbias_ptr += long(own_batch * heads + own_head) * rows * columns
    tl.store(dbias_ptr + i.to(tl.int64) * columns + j, tile, mask=(i < rows) & (j < columns))


@kernel(do_not_specialize=[*RUNTIME, "rows"])
def backward_drelative_kernel(
    drelative_ptr, rows,  # (1 or H, 2 radius + 1), contiguous, float32
    q_ptr, stride_qb, stride_qh, stride_qn, stride_qd,  # (B, H, N_q, D)
    k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,  # (B, H_kv, N_k, D)
    v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,  # (B, H_kv, N_k, D)
    dout_ptr, stride_gb, stride_gh, stride_gn, stride_gd,  # (B, H, N_q, D)
    lse_ptr, delta_ptr,  # (B, H, N_q), contiguous
    bias_ptr, stride_bb, stride_bh, stride_bi, stride_bj,
    mask_ptr, stride_mb, stride_mh, stride_mi, stride_mj,
    relative_ptr, stride_rh, radius,
    seed_ptr, threshold, keep_scale,
    cu_q_ptr, cu_k_ptr, sequences,
    H, H_kv, N_q, N_k, left, right, softmax_scale, softcap,
    D: tl.constexpr,
    GRAIN: tl.constexpr,  # elements that strides but the last are counted in
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    TOP_LEFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of the relative bias, summed along diagonals j - p, over sequences, and over heads if they
    share one. One program per BLOCK_M diagonals; grid (rows * ceil((2 radius + 1) / BLOCK_M),).

    BLOCK_M diagonals of BLOCK_M queries lie in a tile of BLOCK_M queries and 2 BLOCK_M keys, at column i + t
    for query i and diagonal t. Half of the tile is another program's: twice the products, and no memory but
    the result.
    """
    blocks = tl.cdiv(2 * radius + 1, BLOCK_M)
    program = tl.program_id(0)
    own_head, first_diagonal = program // blocks, program % blocks * BLOCK_M
    t = tl.arange(0, BLOCK_M)
    skew = t[:, None] + t[None, :]
    sums = tl.zeros([BLOCK_M], tl.float32)
    for head in range(tl.where(rows < H, 0, own_head), tl.where(rows < H, H, own_head + 1)):
        for sequence in range(sequences):
            first_q, first_k, n_q, n_k, batch = 0, 0, N_q, N_k, sequence
            if cu_q_ptr is not None:
                first_q, n_q = document(cu_q_ptr, sequence, N_q, True)
                first_k, n_k = document(cu_k_ptr, sequence, N_k, True)
                batch = sequence * 0
            offset = 0
            if not TOP_LEFT:
                offset = n_k - n_q
            # Key of query 0 on the first diagonal. Queries whose keys lie outside are passed over.
            shift = offset + first_diagonal - radius
            begin = tl.maximum(-shift - 2 * BLOCK_M + 1, 0) // BLOCK_M * BLOCK_M
            end = tl.minimum(n_k - shift, n_q)
            for first_query in range(begin, end, BLOCK_M):
                tile = _gradients(
                    batch, head, sequence, first_query, first_query + shift, first_q, first_k,
                    n_q, n_k, offset,
                    q_ptr, stride_qb, stride_qh, stride_qn, stride_qd,
                    k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,
                    v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,
                    dout_ptr, stride_gb, stride_gh, stride_gn, stride_gd, lse_ptr, delta_ptr,
                    bias_ptr, stride_bb, stride_bh, stride_bi, stride_bj,
                    mask_ptr, stride_mb, stride_mh, stride_mi, stride_mj, relative_ptr, stride_rh, radius,
                    seed_ptr, threshold, keep_scale, H, H_kv, N_q, left, right, softmax_scale, softcap,
                    D, GRAIN, HAS_LEFT, HAS_RIGHT, SOFTCAP, BLOCK_M, 2 * BLOCK_M, BLOCK_D,
                )  # fmt: skip
                sums += tl.sum(tl.gather(tile, skew, 1), 0)
    place = first_diagonal + t
    drelative_ptr += long(own_head) * (2 * radius + 1)
    tl.store(drelative_ptr + place, sums, mask=place < 2 * radius + 1)
