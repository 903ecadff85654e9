"""The Triton kernels of attention. Imported on first use by triton.py, which launches them."""

# Triton compiles these functions; annotations would be read as types of arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# Values that change from call to call: a kernel is not compiled again for them.
RUNTIME = ["H", "H_kv", "N_q", "N_k", "diagonal"]


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    q_ptr, stride_qb, stride_qh, stride_qn, stride_qd,  # (B, H, N_q, D)
    k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,  # (B, H_kv, N_k, D)
    v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,  # (B, H_kv, N_k, D)
    out_ptr, stride_ob, stride_oh, stride_on, stride_od,  # (B, H, N_q, D)
    lse_ptr,  # (B, H, N_q), contiguous
    H, H_kv, N_q, N_k, diagonal, softmax_scale,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,  # False: every key is seen and diagonal is not read
    WIDEN: tl.constexpr,  # bfloat16 computed in float32, for the interpreter
    BLOCK_M: tl.constexpr,  # queries
    BLOCK_N: tl.constexpr,  # keys
    BLOCK_D: tl.constexpr,  # power of two, at least D
):  # fmt: skip
    """One program per block of queries; grid (B * H * ceil(N_q / BLOCK_M),).

        scores = q @ k^T * softmax_scale
        out    = exp(scores - row_max) @ v / row_sum
        lse    = row_max + log(row_sum)

    with row_max, row_sum and the numerator carried from key block to key block. A program reads its queries
    once, and once the keys and values that they see. Derivation: docs/kernels/attention.md.
    Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135.
    """
    blocks = tl.cdiv(N_q, BLOCK_M)
    program = tl.program_id(0)
    row = program // blocks  # batch * H + head
    batch, head = row // H, row % H
    head_kv = head // (H // H_kv)
    # A causal row's last block sees the most keys: longest first leaves the shortest for the end.
    first_query = (blocks - 1 - program % blocks) * BLOCK_M
    queries = first_query + tl.arange(0, BLOCK_M)

    q_ptr += _offset(batch, stride_qb, head, stride_qh)
    k_ptr += _offset(batch, stride_kb, head_kv, stride_kh)
    v_ptr += _offset(batch, stride_vb, head_kv, stride_vh)
    out_ptr += _offset(batch, stride_ob, head, stride_oh)
    lse_ptr += row.to(tl.int64) * N_q

    q = _load(q_ptr, queries, N_q, stride_qn, stride_qd, D, BLOCK_D)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    full, stop = _key_range(first_query, N_k, diagonal, CAUSAL, BLOCK_M, BLOCK_N)
    for first_key in range(0, full, BLOCK_N):
        row_max, row_sum, acc = _attend(
            q, row_max, row_sum, acc, queries, first_key,
            k_ptr, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd, N_q, N_k, diagonal,
            softmax_scale, D, CAUSAL, False, WIDEN, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for first_key in range(full, stop, BLOCK_N):
        row_max, row_sum, acc = _attend(
            q, row_max, row_sum, acc, queries, first_key,
            k_ptr, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd, N_q, N_k, diagonal,
            softmax_scale, D, CAUSAL, True, WIDEN, BLOCK_N, BLOCK_D,
        )  # fmt: skip

    # Select on the sum, so that a query without a visible key is zero whatever v holds.
    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    out = tl.where(empty[:, None], 0.0, acc / row_sum[:, None])
    lse = tl.where(empty, float("-inf"), row_max / _unit(q.dtype) + tl.log(row_sum))
    _store(out_ptr, out, queries, N_q, stride_on, stride_od, D, WIDEN, BLOCK_D)
    tl.store(lse_ptr + queries, lse, mask=queries < N_q)


@triton.jit(do_not_specialize=RUNTIME)
def delta_kernel(
    out_ptr, stride_ob, stride_oh, stride_on, stride_od,  # (B, H, N_q, D)
    dout_ptr, stride_gb, stride_gh, stride_gn, stride_gd,  # (B, H, N_q, D)
    dlse_ptr, delta_ptr,  # (B, H, N_q), contiguous; dlse may be None
    H, N_q,
    D: tl.constexpr,
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
    out_ptr += _offset(batch, stride_ob, head, stride_oh)
    dout_ptr += _offset(batch, stride_gb, head, stride_gh)
    out = _load(out_ptr, queries, N_q, stride_on, stride_od, D, BLOCK_D).to(tl.float32)
    dout = _load(dout_ptr, queries, N_q, stride_gn, stride_gd, D, BLOCK_D).to(tl.float32)
    delta = tl.sum(dout * out, 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row.to(tl.int64) * N_q + queries, mask=seen, other=0.0)
    tl.store(delta_ptr + row.to(tl.int64) * N_q + queries, delta, mask=seen)


@triton.jit(do_not_specialize=RUNTIME)
def backward_dq_kernel(
    dq_ptr, stride_xb, stride_xh, stride_xn, stride_xd,  # (B, H, N_q, D)
    q_ptr, stride_qb, stride_qh, stride_qn, stride_qd,  # (B, H, N_q, D)
    k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,  # (B, H_kv, N_k, D)
    v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,  # (B, H_kv, N_k, D)
    dout_ptr, stride_gb, stride_gh, stride_gn, stride_gd,  # (B, H, N_q, D)
    lse_ptr, delta_ptr,  # (B, H, N_q), contiguous
    H, H_kv, N_q, N_k, diagonal, softmax_scale,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per block of queries; grid (B * H * ceil(N_q / BLOCK_M),).

        weights = exp(scores - lse)
        dscores = weights * (dout @ v^T - delta)
        dq      = dscores @ k * softmax_scale

    Nothing is added across programs, so the result is the same bits every time.
    """
    blocks = tl.cdiv(N_q, BLOCK_M)
    program = tl.program_id(0)
    row = program // blocks
    batch, head = row // H, row % H
    head_kv = head // (H // H_kv)
    first_query = (blocks - 1 - program % blocks) * BLOCK_M
    queries = first_query + tl.arange(0, BLOCK_M)

    dq_ptr += _offset(batch, stride_xb, head, stride_xh)
    q_ptr += _offset(batch, stride_qb, head, stride_qh)
    k_ptr += _offset(batch, stride_kb, head_kv, stride_kh)
    v_ptr += _offset(batch, stride_vb, head_kv, stride_vh)
    dout_ptr += _offset(batch, stride_gb, head, stride_gh)

    q = _load(q_ptr, queries, N_q, stride_qn, stride_qd, D, BLOCK_D)
    dout = _load(dout_ptr, queries, N_q, stride_gn, stride_gd, D, BLOCK_D)
    lse, delta = _load_statistics(lse_ptr, delta_ptr, row, queries, N_q, q.dtype)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    full, stop = _key_range(first_query, N_k, diagonal, CAUSAL, BLOCK_M, BLOCK_N)
    for first_key in range(0, full, BLOCK_N):
        dq = _add_dq(
            dq, q, dout, lse, delta, queries, first_key,
            k_ptr, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd, N_q, N_k, diagonal,
            softmax_scale, D, CAUSAL, False, WIDEN, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for first_key in range(full, stop, BLOCK_N):
        dq = _add_dq(
            dq, q, dout, lse, delta, queries, first_key,
            k_ptr, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd, N_q, N_k, diagonal,
            softmax_scale, D, CAUSAL, True, WIDEN, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    _store(dq_ptr, dq * softmax_scale, queries, N_q, stride_xn, stride_xd, D, WIDEN, BLOCK_D)


@triton.jit(do_not_specialize=RUNTIME)
def backward_dk_dv_kernel(
    dk_ptr, stride_xb, stride_xh, stride_xn, stride_xd,  # (B, H_kv, N_k, D)
    dv_ptr, stride_yb, stride_yh, stride_yn, stride_yd,  # (B, H_kv, N_k, D)
    q_ptr, stride_qb, stride_qh, stride_qn, stride_qd,  # (B, H, N_q, D)
    k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,  # (B, H_kv, N_k, D)
    v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,  # (B, H_kv, N_k, D)
    dout_ptr, stride_gb, stride_gh, stride_gn, stride_gd,  # (B, H, N_q, D)
    lse_ptr, delta_ptr,  # (B, H, N_q), contiguous
    H, H_kv, N_q, N_k, diagonal, softmax_scale,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per block of keys; grid (B * H_kv * ceil(N_k / BLOCK_N),).

        dv = weights^T @ dout
        dk = dscores^T @ q * softmax_scale

    summed in a fixed order over the query heads that share the keys and the query blocks that see them. The
    scores are computed transposed, (keys, queries), so that weights^T and dscores^T are left operands in
    registers already.
    """
    blocks = tl.cdiv(N_k, BLOCK_N)
    program = tl.program_id(0)
    row_kv = program // blocks  # batch * H_kv + head_kv
    batch, head_kv = row_kv // H_kv, row_kv % H_kv
    group = H // H_kv
    # The first keys are seen by the most queries: longest first.
    first_key = (program % blocks) * BLOCK_N
    keys = first_key + tl.arange(0, BLOCK_N)

    k_ptr += _offset(batch, stride_kb, head_kv, stride_kh)
    v_ptr += _offset(batch, stride_vb, head_kv, stride_vh)
    k = _load(k_ptr, keys, N_k, stride_kn, stride_kd, D, BLOCK_D)
    v = _load(v_ptr, keys, N_k, stride_vn, stride_vd, D, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    start, full = _query_range(first_key, N_q, N_k, diagonal, CAUSAL, BLOCK_M, BLOCK_N)
    for member in range(group):
        head = head_kv * group + member
        row = batch * H + head
        q_head = q_ptr + _offset(batch, stride_qb, head, stride_qh)
        dout_head = dout_ptr + _offset(batch, stride_gb, head, stride_gh)
        # Not pipelined: few blocks, and two pipelines would spill registers.
        for first_query in tl.range(start, full, BLOCK_M, num_stages=1):
            dk, dv = _add_dk_dv(
                dk, dv, k, v, keys, first_query, row, q_head, stride_qn, stride_qd,
                dout_head, stride_gn, stride_gd, lse_ptr, delta_ptr, N_q, N_k, diagonal,
                softmax_scale, D, CAUSAL, True, WIDEN, BLOCK_M, BLOCK_D,
            )  # fmt: skip
        for first_query in range(full, N_q, BLOCK_M):
            dk, dv = _add_dk_dv(
                dk, dv, k, v, keys, first_query, row, q_head, stride_qn, stride_qd,
                dout_head, stride_gn, stride_gd, lse_ptr, delta_ptr, N_q, N_k, diagonal,
                softmax_scale, D, CAUSAL, False, WIDEN, BLOCK_M, BLOCK_D,
            )  # fmt: skip
    dk_ptr += _offset(batch, stride_xb, head_kv, stride_xh)
    dv_ptr += _offset(batch, stride_yb, head_kv, stride_yh)
    _store(dk_ptr, dk * softmax_scale, keys, N_k, stride_xn, stride_xd, D, WIDEN, BLOCK_D)
    _store(dv_ptr, dv, keys, N_k, stride_yn, stride_yd, D, WIDEN, BLOCK_D)


@triton.jit
def _attend(
    q, row_max, row_sum, acc, queries, first_key, k_ptr, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd,
    N_q, N_k, diagonal, softmax_scale,
    D: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The running softmax state after one more block of keys."""
    keys = first_key + tl.arange(0, BLOCK_N)
    k = _load(k_ptr, keys, N_k, stride_kn, stride_kd, D, BLOCK_D)
    scores = _scores(q, k, softmax_scale, WIDEN)
    if MASKED:
        visible = _visible(queries[:, None], keys[None, :], N_q, N_k, diagonal, CAUSAL)
        scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # A row with no visible key has row_max = -inf; subtracting 0 instead keeps exp2(-inf) = 0 and no NaN.
    subtract = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = _exp(scores - subtract[:, None], q.dtype)
    rescale = _exp(row_max - subtract, q.dtype)
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    v = _load(v_ptr, keys, N_k, stride_vn, stride_vd, D, BLOCK_D)
    acc = _dot(_round(weights, v.dtype, WIDEN), v, acc * rescale[:, None], WIDEN)
    return new_max, row_sum, acc


@triton.jit
def _add_dq(
    dq, q, dout, lse, delta, queries, first_key, k_ptr, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd,
    N_q, N_k, diagonal, softmax_scale,
    D: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq plus what one block of keys gives, without the scale."""
    keys = first_key + tl.arange(0, BLOCK_N)
    k = _load(k_ptr, keys, N_k, stride_kn, stride_kd, D, BLOCK_D)
    v = _load(v_ptr, keys, N_k, stride_vn, stride_vd, D, BLOCK_D)
    scores = _scores(q, k, softmax_scale, WIDEN)
    weights = _exp(scores - lse[:, None], q.dtype)
    dweights = _dot(dout, tl.trans(v), None, WIDEN)
    dscores = weights * (dweights - delta[:, None])
    if MASKED:
        visible = _visible(queries[:, None], keys[None, :], N_q, N_k, diagonal, CAUSAL)
        dscores = tl.where(visible, dscores, 0.0)
        k = _finite(k)
    return _dot(_round(dscores, k.dtype, WIDEN), k, dq, WIDEN)


@triton.jit
def _add_dk_dv(
    dk, dv, k, v, keys, first_query, row, q_ptr, stride_qn, stride_qd, dout_ptr, stride_gn, stride_gd,
    lse_ptr, delta_ptr, N_q, N_k, diagonal, softmax_scale,
    D: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv plus what one block of queries gives, dk without the scale."""
    queries = first_query + tl.arange(0, BLOCK_M)
    q = _load(q_ptr, queries, N_q, stride_qn, stride_qd, D, BLOCK_D)
    dout = _load(dout_ptr, queries, N_q, stride_gn, stride_gd, D, BLOCK_D)
    lse, delta = _load_statistics(lse_ptr, delta_ptr, row, queries, N_q, q.dtype)
    scores = _scores(k, q, softmax_scale, WIDEN)  # (keys, queries)
    weights = _exp(scores - lse[None, :], q.dtype)
    dweights = _dot(v, tl.trans(dout), None, WIDEN)
    dscores = weights * (dweights - delta[None, :])
    if MASKED:
        visible = _visible(queries[None, :], keys[:, None], N_q, N_k, diagonal, CAUSAL)
        weights = tl.where(visible, weights, 0.0)
        dscores = tl.where(visible, dscores, 0.0)
        q = _finite(q)
    dv = _dot(_round(weights, dout.dtype, WIDEN), dout, dv, WIDEN)
    dk = _dot(_round(dscores, q.dtype, WIDEN), q, dk, WIDEN)
    return dk, dv


@triton.jit
def _key_range(
    first_query, N_k, diagonal, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(full, stop): every query of the block sees all keys before full, and none sees a key from stop on.

    full is a multiple of BLOCK_N.
    """
    full, stop = N_k, N_k
    if CAUSAL:
        full = tl.minimum(tl.maximum(first_query + diagonal + 1, 0), N_k)
        stop = tl.minimum(tl.maximum(first_query + BLOCK_M + diagonal, 0), N_k)
    return full // BLOCK_N * BLOCK_N, stop


@triton.jit
def _query_range(
    first_key, N_q, N_k, diagonal, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(start, full): no query before start sees a key of the block, every query from full on sees them all.

    Multiples of BLOCK_M. start may lie beyond full, and both beyond N_q, where no query sees a key.
    """
    start, full = 0, 0
    if CAUSAL:
        last_key = tl.minimum(first_key + BLOCK_N, N_k) - 1
        start = tl.maximum(first_key - diagonal, 0) // BLOCK_M * BLOCK_M
        full = tl.cdiv(tl.maximum(last_key - diagonal, 0), BLOCK_M) * BLOCK_M
    return start, tl.minimum(full, tl.cdiv(N_q, BLOCK_M) * BLOCK_M)


@triton.jit
def _visible(queries, keys, N_q, N_k, diagonal, CAUSAL: tl.constexpr):
    """Which query sees which key; what lies beyond the lengths sees nothing and is seen by nothing."""
    visible = (queries < N_q) & (keys < N_k)
    if CAUSAL:
        visible = visible & (keys - queries <= diagonal)
    return visible


@triton.jit
def _load_statistics(lse_ptr, delta_ptr, row, queries, N_q, dtype: tl.constexpr):
    """lse in the unit of the dtype and delta of one block of queries.

    Where every score is -inf lse is 0 instead of -inf, because -inf - -inf would be NaN. Beyond N_q nothing
    needs masking: dout and delta are zero there.
    """
    base = row.to(tl.int64) * N_q
    lse = tl.load(lse_ptr + base + queries, mask=queries < N_q, other=0.0)
    delta = tl.load(delta_ptr + base + queries, mask=queries < N_q, other=0.0)
    return tl.where(lse == float("-inf"), 0.0, lse * _unit(dtype)), delta


@triton.jit
def _offset(batch, stride_b, head, stride_h):
    """Where one head of one sequence begins, in 64 bits: a tensor may hold more than 2^31 elements."""
    return batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h


@triton.jit
def _load(ptr, rows, N, stride_n, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(len(rows), BLOCK_D) elements of one head, zero beyond (N, D)."""
    columns = tl.arange(0, BLOCK_D)
    pointers = ptr + rows[:, None].to(tl.int64) * stride_n + columns[None, :].to(tl.int64) * stride_d
    mask = (rows < N)[:, None]
    if D < BLOCK_D:
        mask = mask & (columns < D)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _store(ptr, x, rows, N, stride_n, stride_d, D: tl.constexpr, WIDEN: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of `_load`, rounding to the memory's dtype."""
    columns = tl.arange(0, BLOCK_D)
    pointers = ptr + rows[:, None].to(tl.int64) * stride_n + columns[None, :].to(tl.int64) * stride_d
    mask = (rows < N)[:, None]
    if D < BLOCK_D:
        mask = mask & (columns < D)[None, :]
    tl.store(pointers, _round(x, ptr.dtype.element_ty, WIDEN), mask=mask)


@triton.jit
def _finite(x):
    """x with zero for NaN and infinity.

    A weight of zero times such an element would be NaN, and reach queries that do not see it. Where a NaN is
    seen, the score has carried it on already.
    """
    wide = x.to(tl.float32)
    return tl.where(tl.abs(wide) < float("inf"), wide, 0.0).to(x.dtype)


@triton.jit
def _unit(dtype: tl.constexpr):
    """What scores are counted in, as a factor of natural units.

    16-bit inputs: log2(e). exp2 is one instruction, and the factor goes into the scale. float32 inputs: 1,
    because the rounding error of lse * log2(e) grows with lse, and would be a relative error of the weights.
    """
    if dtype == tl.float32:
        return 1.0
    return LOG2_E


@triton.jit
def _exp(scores, dtype: tl.constexpr):
    """The exponential of scores or their differences, counted in the unit of inputs of this dtype."""
    if dtype == tl.float32:
        return tl.exp(scores)
    return tl.exp2(scores)


@triton.jit
def _scores(a, b, softmax_scale, WIDEN: tl.constexpr):
    """a @ b^T * softmax_scale in the unit of the dtype, of a (M, BLOCK_D) and b (N, BLOCK_D).

    Wide float32 rows are multiplied in two halves, the even and the odd columns: shorter sums have smaller
    errors.
    """
    scale = softmax_scale * _unit(a.dtype)
    if a.dtype == tl.float32 and a.shape[1] > 128:
        a_even, a_odd = tl.split(tl.reshape(a, [a.shape[0], a.shape[1] // 2, 2]))
        b_even, b_odd = tl.split(tl.reshape(b, [b.shape[0], b.shape[1] // 2, 2]))
        # Scaled before they are added: the compiler would make one long sum of a sum of two products.
        return (
            _dot(a_even, tl.trans(b_even), None, WIDEN) * scale
            + _dot(a_odd, tl.trans(b_odd), None, WIDEN) * scale
        )
    return _dot(a, tl.trans(b), None, WIDEN) * scale


@triton.jit
def _round(x, dtype: tl.constexpr, WIDEN: tl.constexpr):
    """float32 x in another dtype, rounded to nearest; the interpreter would cut bfloat16 off."""
    if WIDEN:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def _dot(a, b, acc, WIDEN: tl.constexpr):
    """a @ b + acc in float32; float32 operands are not shortened to TF32."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
