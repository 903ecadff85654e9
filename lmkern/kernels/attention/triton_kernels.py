"""The Triton kernels of attention. Imported on first use by triton.py, which launches them.

A loop over blocks has three phases: those that some query sees in part, those that all see, and again those
in part. `tl.static_range` writes the body out once for each, the check of places in the first and last alone.
"""

# Triton compiles these functions; annotations would be read as types of arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton.language as tl

from lmkern.kernels.attention.triton_parts import (
    biased,
    dot,
    exp,
    finite,
    kept,
    key_range,
    load,
    load_statistics,
    offset_of,
    query_range,
    scored,
    sequence_of,
    store,
    unit_of,
    visible,
)
from lmkern.kernels.triton_kernels import long, rounded, wide
from lmkern.kernels.triton_launch import kernel

# Values that change from call to call: a kernel is not compiled again for them.
RUNTIME = [
    "H", "H_kv", "N_q", "N_k", "blocks", "sequences", "left", "right", "radius", "threshold", "stride_rh",
    "stride_bb", "stride_bh", "stride_bi", "stride_mb", "stride_mh", "stride_mi",
    *(f"stride_{tensor}{dimension}" for tensor in "qkvogxy" for dimension in "bhn"),
]  # fmt: skip


@kernel(do_not_specialize=RUNTIME)
def forward_kernel(
    q_ptr, stride_qb, stride_qh, stride_qn, stride_qd,  # (B, H, N_q, D)
    k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,  # (B, H_kv, N_k, D)
    v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,  # (B, H_kv, N_k, D)
    out_ptr, stride_ob, stride_oh, stride_on, stride_od,  # (B, H, N_q, D)
    lse_ptr,  # (B, H, N_q), contiguous
    sinks_ptr,  # (H,), or None
    bias_ptr, stride_bb, stride_bh, stride_bi, stride_bj,  # (B, H, N_q, N_k) through its strides, or None
    mask_ptr, stride_mb, stride_mh, stride_mi, stride_mj,  # likewise, 0: hidden
    relative_ptr, stride_rh, radius,  # (H or 1, 2 radius + 1), or None
    seed_ptr, threshold, keep_scale,  # () int64, or None: no dropout
    cu_q_ptr, cu_k_ptr, sequence_ptr, first_block_ptr, sequences,  # packed documents, or None
    blocks, H, H_kv, N_q, N_k, left, right, softmax_scale, softcap,
    D: tl.constexpr,
    GRAIN: tl.constexpr,  # elements that strides but the last are counted in
    HAS_LEFT: tl.constexpr,  # False: left is not read
    HAS_RIGHT: tl.constexpr,
    TOP_LEFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries
    BLOCK_N: tl.constexpr,  # keys
    BLOCK_D: tl.constexpr,  # power of two, at least D
):  # fmt: skip
    """One program per block of queries; grid (B * H * blocks,).

        scores = softcap(q @ k^T * softmax_scale) + biases
        out    = exp(scores - row_max) @ v / row_sum
        lse    = row_max + log(row_sum)

    with row_max, row_sum and the numerator carried from key block to key block. A program reads its queries
    once, and once the keys and values that they see. Derivation: docs/kernels/attention.md.
    Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135.
    """
    program = tl.program_id(0)
    row = program // blocks  # batch * H + head
    batch, head = row // H, row % H
    head_kv = head // (H // H_kv)
    # A causal row's last block sees the most keys: longest first leaves the shortest for the end.
    sequence, block, first_q, n_q, first_k, n_k, offset = sequence_of(
        blocks - 1 - program % blocks, batch, N_q, N_k, cu_q_ptr, cu_k_ptr, sequence_ptr, first_block_ptr,
        sequences, TOP_LEFT,
    )  # fmt: skip
    first_query = block * BLOCK_M
    queries = first_query + tl.arange(0, BLOCK_M)

    q_ptr += offset_of(batch, stride_qb, head, stride_qh, first_q, stride_qn, GRAIN)
    k_ptr += offset_of(batch, stride_kb, head_kv, stride_kh, first_k, stride_kn, GRAIN)
    v_ptr += offset_of(batch, stride_vb, head_kv, stride_vh, first_k, stride_vn, GRAIN)
    out_ptr += offset_of(batch, stride_ob, head, stride_oh, first_q, stride_on, GRAIN)
    lse_ptr += long(row) * N_q + first_q

    unit: tl.constexpr = unit_of(q_ptr.dtype.element_ty, bias_ptr is not None or relative_ptr is not None)
    q = load(q_ptr, queries, n_q, stride_qn, stride_qd, D, BLOCK_D, GRAIN)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    start, full, full_stop, stop = key_range(
        first_query, n_k, offset, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    for PHASE in tl.static_range(0 if HAS_LEFT else 1, 3):
        begin = start if PHASE == 0 else (full if PHASE == 1 else full_stop)
        end = full if PHASE == 0 else (full_stop if PHASE == 1 else stop)
        for first_key in range(begin, end, BLOCK_N):
            keys = first_key + tl.arange(0, BLOCK_N)
            k = load(k_ptr, keys, n_k, stride_kn, stride_kd, D, BLOCK_D, GRAIN)
            scores, _ = scored(q, k, softmax_scale, softcap, SOFTCAP, unit)
            scores = biased(
                scores, queries[:, None], keys[None, :], n_q, n_k, offset, batch, head,
                bias_ptr, stride_bb, stride_bh, stride_bi, stride_bj,
                mask_ptr, stride_mb, stride_mh, stride_mi, stride_mj,
                relative_ptr, stride_rh, radius, unit,
            )  # fmt: skip
            if PHASE != 1:
                seen = visible(
                    queries[:, None], keys[None, :], n_q, n_k, offset, left, right, HAS_LEFT, HAS_RIGHT
                )
                scores = tl.where(seen, scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            # A row with no visible key has row_max = -inf: subtracting 0 keeps exp2(-inf) = 0 and no NaN.
            subtract = tl.where(new_max == float("-inf"), 0.0, new_max)
            weights = exp(scores - subtract[:, None], unit)
            rescale = exp(row_max - subtract, unit)
            row_sum = row_sum * rescale + tl.sum(weights, 1)
            if seed_ptr is not None:
                weights *= kept(seed_ptr, threshold, keep_scale, queries, first_key, head, sequence, BLOCK_N)
            v = load(v_ptr, keys, n_k, stride_vn, stride_vd, D, BLOCK_D, GRAIN)
            acc = dot(rounded(weights, v.dtype), v, acc * rescale[:, None])
            row_max = new_max

    # Select on the sum, so that a query without a visible key is zero whatever v holds.
    empty = row_sum == 0.0
    divisor = tl.where(empty, 1.0, row_sum)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head) * unit
        highest = tl.maximum(row_max, sink)
        subtract = tl.where(highest == float("-inf"), 0.0, highest)
        factor = exp(row_max - subtract, unit)
        total = row_sum * factor + exp(sink - subtract, unit)
        divisor = tl.where(empty, 1.0, total / tl.where(empty, 1.0, factor))
        lse = tl.where(total == 0.0, float("-inf"), subtract / unit + tl.log(total))
    else:
        lse = tl.where(empty, float("-inf"), row_max / unit + tl.log(divisor))
    out = tl.where(empty[:, None], 0.0, acc / divisor[:, None])
    store(out_ptr, out, queries, n_q, stride_on, stride_od, D, BLOCK_D, GRAIN)
    tl.store(lse_ptr + queries, lse, mask=queries < n_q)


@kernel(do_not_specialize=RUNTIME)
def delta_kernel(
    out_ptr, stride_ob, stride_oh, stride_on, stride_od,  # (B, H, N_q, D)
    dout_ptr, stride_gb, stride_gh, stride_gn, stride_gd,  # (B, H, N_q, D)
    dlse_ptr, delta_ptr,  # (B, H, N_q), contiguous; dlse may be None
    H, N_q,
    D: tl.constexpr,
    GRAIN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dout * out) - dlse; grid (B * H * ceil(N_q / BLOCK_M),)."""
    blocks = tl.cdiv(N_q, BLOCK_M)
    program = tl.program_id(0)
    row = program // blocks
    batch, head = row // H, row % H
    queries = (program % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    seen = queries < N_q
    out_ptr += offset_of(batch, stride_ob, head, stride_oh, 0, stride_on, GRAIN)
    dout_ptr += offset_of(batch, stride_gb, head, stride_gh, 0, stride_gn, GRAIN)
    out = wide(load(out_ptr, queries, N_q, stride_on, stride_od, D, BLOCK_D, GRAIN))
    dout = wide(load(dout_ptr, queries, N_q, stride_gn, stride_gd, D, BLOCK_D, GRAIN))
    delta = tl.sum(dout * out, 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + long(row) * N_q + queries, mask=seen, other=0.0)
    tl.store(delta_ptr + long(row) * N_q + queries, delta, mask=seen)


@kernel(do_not_specialize=RUNTIME)
def backward_dq_kernel(
    dq_ptr, stride_xb, stride_xh, stride_xn, stride_xd,  # (B, H, N_q, D)
    q_ptr, stride_qb, stride_qh, stride_qn, stride_qd,  # (B, H, N_q, D)
    k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,  # (B, H_kv, N_k, D)
    v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,  # (B, H_kv, N_k, D)
    dout_ptr, stride_gb, stride_gh, stride_gn, stride_gd,  # (B, H, N_q, D)
    lse_ptr, delta_ptr,  # (B, H, N_q), contiguous
    bias_ptr, stride_bb, stride_bh, stride_bi, stride_bj,  # (B, H, N_q, N_k) through its strides, or None
    mask_ptr, stride_mb, stride_mh, stride_mi, stride_mj,  # likewise, 0: hidden
    relative_ptr, stride_rh, radius,  # (H or 1, 2 radius + 1), or None
    seed_ptr, threshold, keep_scale,  # () int64, or None: no dropout
    cu_q_ptr, cu_k_ptr, sequence_ptr, first_block_ptr, sequences,  # packed documents, or None
    blocks, H, H_kv, N_q, N_k, left, right, softmax_scale, softcap,
    D: tl.constexpr,
    GRAIN: tl.constexpr,  # elements that strides but the last are counted in
    HAS_LEFT: tl.constexpr,  # False: left is not read
    HAS_RIGHT: tl.constexpr,
    TOP_LEFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries
    BLOCK_N: tl.constexpr,  # keys
    BLOCK_D: tl.constexpr,  # power of two, at least D
):  # fmt: skip
    """One program per block of queries; grid (B * H * blocks,).

        weights = exp(scores - lse)
        dscores = weights * (dout @ v^T - delta)
        dq      = dscores @ k * softmax_scale

    Nothing is added across programs, so the result is the same bits every time.
    """
    program = tl.program_id(0)
    row = program // blocks
    batch, head = row // H, row % H
    head_kv = head // (H // H_kv)
    sequence, block, first_q, n_q, first_k, n_k, offset = sequence_of(
        blocks - 1 - program % blocks, batch, N_q, N_k, cu_q_ptr, cu_k_ptr, sequence_ptr, first_block_ptr,
        sequences, TOP_LEFT,
    )  # fmt: skip
    first_query = block * BLOCK_M
    queries = first_query + tl.arange(0, BLOCK_M)

    dq_ptr += offset_of(batch, stride_xb, head, stride_xh, first_q, stride_xn, GRAIN)
    q_ptr += offset_of(batch, stride_qb, head, stride_qh, first_q, stride_qn, GRAIN)
    k_ptr += offset_of(batch, stride_kb, head_kv, stride_kh, first_k, stride_kn, GRAIN)
    v_ptr += offset_of(batch, stride_vb, head_kv, stride_vh, first_k, stride_vn, GRAIN)
    dout_ptr += offset_of(batch, stride_gb, head, stride_gh, first_q, stride_gn, GRAIN)

    unit: tl.constexpr = unit_of(q_ptr.dtype.element_ty, bias_ptr is not None or relative_ptr is not None)
    CHOSEN: tl.constexpr = (mask_ptr is not None) or (bias_ptr is not None)
    q = load(q_ptr, queries, n_q, stride_qn, stride_qd, D, BLOCK_D, GRAIN)
    dout = load(dout_ptr, queries, n_q, stride_gn, stride_gd, D, BLOCK_D, GRAIN)
    base = long(row) * N_q + first_q
    lse, delta = load_statistics(lse_ptr, delta_ptr, base, queries, n_q, unit)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    start, full, full_stop, stop = key_range(
        first_query, n_k, offset, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    for PHASE in tl.static_range(0 if HAS_LEFT else 1, 3):
        begin = start if PHASE == 0 else (full if PHASE == 1 else full_stop)
        end = full if PHASE == 0 else (full_stop if PHASE == 1 else stop)
        for first_key in range(begin, end, BLOCK_N):
            keys = first_key + tl.arange(0, BLOCK_N)
            k = load(k_ptr, keys, n_k, stride_kn, stride_kd, D, BLOCK_D, GRAIN)
            v = load(v_ptr, keys, n_k, stride_vn, stride_vd, D, BLOCK_D, GRAIN)
            scores, slope = scored(q, k, softmax_scale, softcap, SOFTCAP, unit)
            scores = biased(
                scores, queries[:, None], keys[None, :], n_q, n_k, offset, batch, head,
                bias_ptr, stride_bb, stride_bh, stride_bi, stride_bj,
                mask_ptr, stride_mb, stride_mh, stride_mi, stride_mj,
                relative_ptr, stride_rh, radius, unit,
            )  # fmt: skip
            if PHASE != 1:
                seen = visible(
                    queries[:, None], keys[None, :], n_q, n_k, offset, left, right, HAS_LEFT, HAS_RIGHT
                )
                scores = tl.where(seen, scores, float("-inf"))
            weights = exp(scores - lse[:, None], unit)
            dweights = dot(dout, tl.trans(v), None)
            if seed_ptr is not None:
                dweights *= kept(seed_ptr, threshold, keep_scale, queries, first_key, head, sequence, BLOCK_N)
            dscores = weights * (dweights - delta[:, None]) * slope
            if PHASE != 1 or CHOSEN:
                dscores = tl.where(scores == float("-inf"), 0.0, dscores)
                k = finite(k)
            dq = dot(rounded(dscores, k.dtype), k, dq)
    store(dq_ptr, dq * softmax_scale, queries, n_q, stride_xn, stride_xd, D, BLOCK_D, GRAIN)


@kernel(do_not_specialize=RUNTIME)
def backward_dk_dv_kernel(
    dk_ptr, stride_xb, stride_xh, stride_xn, stride_xd,  # (B, H_kv, N_k, D), or None
    dv_ptr, stride_yb, stride_yh, stride_yn, stride_yd,  # (B, H_kv, N_k, D), or None
    q_ptr, stride_qb, stride_qh, stride_qn, stride_qd,  # (B, H, N_q, D)
    k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,  # (B, H_kv, N_k, D)
    v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,  # (B, H_kv, N_k, D)
    dout_ptr, stride_gb, stride_gh, stride_gn, stride_gd,  # (B, H, N_q, D)
    lse_ptr, delta_ptr,  # (B, H, N_q), contiguous
    bias_ptr, stride_bb, stride_bh, stride_bi, stride_bj,  # (B, H, N_q, N_k) through its strides, or None
    mask_ptr, stride_mb, stride_mh, stride_mi, stride_mj,  # likewise, 0: hidden
    relative_ptr, stride_rh, radius,  # (H or 1, 2 radius + 1), or None
    seed_ptr, threshold, keep_scale,  # () int64, or None: no dropout
    cu_q_ptr, cu_k_ptr, sequence_ptr, first_block_ptr, sequences,  # packed documents, or None
    blocks, H, H_kv, N_q, N_k, left, right, softmax_scale, softcap,
    D: tl.constexpr,
    GRAIN: tl.constexpr,  # elements that strides but the last are counted in
    HAS_LEFT: tl.constexpr,  # False: left is not read
    HAS_RIGHT: tl.constexpr,
    TOP_LEFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries
    BLOCK_N: tl.constexpr,  # keys
    BLOCK_D: tl.constexpr,  # power of two, at least D
):  # fmt: skip
    """One program per block of keys; grid (B * H_kv * blocks,).

        dv = weights^T @ dout
        dk = dscores^T @ q * softmax_scale

    summed in a fixed order over the query heads that share the keys and the query blocks that see them. The
    scores are computed transposed, (keys, queries), so that weights^T and dscores^T are left operands in
    registers already.
    """
    program = tl.program_id(0)
    row_kv = program // blocks  # batch * H_kv + head_kv
    batch, head_kv = row_kv // H_kv, row_kv % H_kv
    group = H // H_kv
    # The first keys are seen by the most queries: longest first.
    sequence, block, first_q, n_q, first_k, n_k, offset = sequence_of(
        program % blocks,
        batch,
        N_q,
        N_k,
        cu_q_ptr,
        cu_k_ptr,
        sequence_ptr,
        first_block_ptr,
        sequences,
        TOP_LEFT,
    )
    first_key = block * BLOCK_N
    keys = first_key + tl.arange(0, BLOCK_N)

    unit: tl.constexpr = unit_of(q_ptr.dtype.element_ty, bias_ptr is not None or relative_ptr is not None)
    CHOSEN: tl.constexpr = (mask_ptr is not None) or (bias_ptr is not None)
    k_ptr += offset_of(batch, stride_kb, head_kv, stride_kh, first_k, stride_kn, GRAIN)
    v_ptr += offset_of(batch, stride_vb, head_kv, stride_vh, first_k, stride_vn, GRAIN)
    k = load(k_ptr, keys, n_k, stride_kn, stride_kd, D, BLOCK_D, GRAIN)
    v = load(v_ptr, keys, n_k, stride_vn, stride_vd, D, BLOCK_D, GRAIN)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    start, full, full_stop, stop = query_range(
        first_key, n_q, n_k, offset, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    for member in range(group):
        head = head_kv * group + member
        q_head = q_ptr + offset_of(batch, stride_qb, head, stride_qh, first_q, stride_qn, GRAIN)
        dout_head = dout_ptr + offset_of(batch, stride_gb, head, stride_gh, first_q, stride_gn, GRAIN)
        base = long(batch * H + head) * N_q + first_q
        for PHASE in tl.static_range(0 if HAS_RIGHT else 1, 3 if HAS_LEFT else 2):
            begin = start if PHASE == 0 else (full if PHASE == 1 else full_stop)
            end = full if PHASE == 0 else (full_stop if PHASE == 1 else stop)
            # Cut blocks are few and not pipelined: a second pipeline would spill registers.
            for first_query in tl.range(begin, end, BLOCK_M, num_stages=None if PHASE == 1 else 1):
                queries = first_query + tl.arange(0, BLOCK_M)
                q = load(q_head, queries, n_q, stride_qn, stride_qd, D, BLOCK_D, GRAIN)
                dout = load(dout_head, queries, n_q, stride_gn, stride_gd, D, BLOCK_D, GRAIN)
                lse, delta = load_statistics(lse_ptr, delta_ptr, base, queries, n_q, unit)
                scores, slope = scored(k, q, softmax_scale, softcap, SOFTCAP, unit)  # (keys, queries)
                scores = biased(
                    scores, queries[None, :], keys[:, None], n_q, n_k, offset, batch, head,
                    bias_ptr, stride_bb, stride_bh, stride_bi, stride_bj,
                    mask_ptr, stride_mb, stride_mh, stride_mi, stride_mj,
                    relative_ptr, stride_rh, radius, unit,
                )  # fmt: skip
                if PHASE != 1:
                    seen = visible(
                        queries[None, :], keys[:, None], n_q, n_k, offset, left, right, HAS_LEFT, HAS_RIGHT
                    )
                    scores = tl.where(seen, scores, float("-inf"))
                weights = exp(scores - lse[None, :], unit)
                dweights = dot(v, tl.trans(dout), None)
                dscores = weights * (dweights - delta[None, :]) * slope
                if seed_ptr is not None:
                    keep = tl.trans(
                        kept(seed_ptr, threshold, keep_scale, queries, first_key, head, sequence, BLOCK_N)
                    )
                    dscores = weights * (dweights * keep - delta[None, :]) * slope
                    weights *= keep
                if PHASE != 1 or CHOSEN:
                    hidden = scores == float("-inf")
                    weights = tl.where(hidden, 0.0, weights)
                    dscores = tl.where(hidden, 0.0, dscores)
                    q = finite(q)
                if dv_ptr is not None:
                    dv = dot(rounded(weights, dout.dtype), dout, dv)
                if dk_ptr is not None:
                    dk = dot(rounded(dscores, q.dtype), q, dk)
    if dk_ptr is not None:
        dk_ptr += offset_of(batch, stride_xb, head_kv, stride_xh, first_k, stride_xn, GRAIN)
        store(dk_ptr, dk * softmax_scale, keys, n_k, stride_xn, stride_xd, D, BLOCK_D, GRAIN)
    if dv_ptr is not None:
        dv_ptr += offset_of(batch, stride_yb, head_kv, stride_yh, first_k, stride_yn, GRAIN)
        store(dv_ptr, dv, keys, n_k, stride_yn, stride_yd, D, BLOCK_D, GRAIN)
