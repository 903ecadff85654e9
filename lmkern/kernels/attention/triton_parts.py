"""What the Triton kernels of attention are made of: which keys are seen, and how scores come about.

A block of scores is (queries, keys), or transposed (keys, queries): functions take the numbers of its queries
and keys as two arrays that broadcast to it.
"""

# Triton compiles these functions; annotations would be read as types of arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from lmkern.kernels.triton_kernels import INTERPRETED, keep_factors, long, rounded, tanh, wide

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sequence_of(
    program, batch, N_q, N_k, cu_q_ptr, cu_k_ptr, sequence_ptr, first_block_ptr, sequences,
    TOP_LEFT: tl.constexpr,
):  # fmt: skip
    """(sequence, block, first_query, n_q, first_key, n_k, offset) of block number `program` of a head.

    offset: a query's position less its number. Packed documents: sequence_ptr has the document of each block
    (the number of documents for one beyond the last, whose n_q and n_k are 0), and first_block_ptr how many
    blocks come before each document.
    """
    if cu_q_ptr is not None:
        sequence = tl.load(sequence_ptr + program)
        there = sequence < sequences
        block = tl.minimum(tl.maximum(program - tl.load(first_block_ptr + sequence), 0), program)
        first_query, n_q = document(cu_q_ptr, sequence, N_q, there)
        first_key, n_k = document(cu_k_ptr, sequence, N_k, there)
    else:
        sequence, block = batch, program
        first_query, first_key, n_q, n_k = 0, 0, N_q, N_k
    offset = 0
    if not TOP_LEFT:
        offset = n_k - n_q
    return sequence, block, first_query, n_q, first_key, n_k, offset


@triton.jit
def document(cu_ptr, sequence, N, there):
    """(first token, tokens) of a packed document, none beyond N whatever cu_ptr holds; none unless there."""
    first = tl.minimum(tl.maximum(tl.load(cu_ptr + sequence), 0), N)
    last = tl.minimum(tl.load(cu_ptr + sequence + 1, mask=there, other=0), N)
    return first, tl.maximum(last, first) - first


@triton.jit
def key_range(
    first_query, n_k, offset, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(start, full, full_stop, stop): the block's queries see no key before start or from stop on, and all of
    them see every key from full to full_stop. All but stop are multiples of BLOCK_N, in ascending order.
    """
    first_position = first_query + offset
    last_position = first_position + BLOCK_M - 1
    start, full, full_stop, stop = 0, 0, n_k, n_k
    if HAS_RIGHT:
        full_stop = tl.minimum(tl.maximum(first_position + right + 1, 0), n_k)
        stop = tl.minimum(tl.maximum(last_position + right + 1, 0), n_k)
    if HAS_LEFT:
        start = tl.minimum(tl.maximum(first_position - left, 0), n_k) // BLOCK_N * BLOCK_N
        full = tl.cdiv(tl.minimum(tl.maximum(last_position - left, 0), n_k), BLOCK_N) * BLOCK_N
    full_stop = full_stop // BLOCK_N * BLOCK_N
    full = tl.minimum(full, tl.cdiv(stop, BLOCK_N) * BLOCK_N)
    return start, full, tl.maximum(full, full_stop), stop


@triton.jit
def query_range(
    first_key, n_q, n_k, offset, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(start, full, full_stop, stop): likewise the queries that see a block of keys, in multiples of BLOCK_M.

    What lies beyond n_k in the block does not count.
    """
    last_key = tl.minimum(first_key + BLOCK_N, n_k) - 1
    start, full, full_stop, stop = 0, 0, n_q, n_q
    if HAS_RIGHT:
        start = tl.minimum(tl.maximum(first_key - offset - right, 0), n_q) // BLOCK_M * BLOCK_M
        full = tl.cdiv(tl.minimum(tl.maximum(last_key - offset - right, 0), n_q), BLOCK_M) * BLOCK_M
    if HAS_LEFT:
        full_stop = tl.minimum(tl.maximum(first_key - offset + left + 1, 0), n_q) // BLOCK_M * BLOCK_M
        stop = tl.minimum(tl.maximum(last_key - offset + left + 1, 0), n_q)
    full = tl.minimum(full, tl.cdiv(stop, BLOCK_M) * BLOCK_M)
    # Without a left bound the last block of queries may be cut, for its loads are masked anyway.
    return start, full, tl.maximum(full, full_stop), stop


@triton.jit
def visible(queries, keys, n_q, n_k, offset, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Which query sees which key, by its place alone."""
    seen = (queries < n_q) & (keys < n_k)
    distance = keys - queries - offset
    if HAS_LEFT:
        seen = seen & (distance >= -left)
    if HAS_RIGHT:
        seen = seen & (distance <= right)
    return seen


@triton.jit
def biased(
    scores, queries, keys, n_q, n_k, offset, batch, head,
    bias_ptr, stride_bb, stride_bh, stride_bi, stride_bj,
    mask_ptr, stride_mb, stride_mh, stride_mi, stride_mj,
    relative_ptr, stride_rh, radius, unit: tl.constexpr,
):  # fmt: skip
    """scores, counted in `unit`, with the biases; -inf where a mask, or a bias of -inf, hides the key."""
    inside = (queries < n_q) & (keys < n_k)
    if relative_ptr is not None:
        place = relative_ptr + long(head) * stride_rh + radius + keys - queries - offset
        scores += tl.load(place, mask=inside, other=0.0) * unit
    if bias_ptr is not None:
        bias_ptr += long(batch) * stride_bb + long(head) * stride_bh
        place = bias_ptr + queries.to(tl.int64) * stride_bi + keys.to(tl.int64) * stride_bj
        bias = wide(tl.load(place, mask=inside, other=0.0))
        # A selection: what is behind a bias of -inf may be NaN.
        scores = tl.where(bias == float("-inf"), float("-inf"), scores + bias * unit)
    if mask_ptr is not None:
        mask_ptr += long(batch) * stride_mb + long(head) * stride_mh
        place = mask_ptr + queries.to(tl.int64) * stride_mi + keys.to(tl.int64) * stride_mj
        scores = tl.where(tl.load(place, mask=inside, other=0) != 0, scores, float("-inf"))
    return scores


@triton.jit
def scored(a, b, softmax_scale, softcap, SOFTCAP: tl.constexpr, unit: tl.constexpr):
    """Scores before the biases, counted in `unit`, and their derivative for a @ b^T * softmax_scale."""
    if SOFTCAP:
        ratio = tanh(scaled_product(a, b, softmax_scale / softcap))
        scores = ratio * (softcap * unit)
        slope = 1.0 - ratio * ratio
    else:
        scores = scaled_product(a, b, softmax_scale * unit)
        slope = 1.0
    return scores, slope


@triton.jit
def scaled_product(a, b, scale):
    """a @ b^T * scale of a (M, BLOCK_D) and b (N, BLOCK_D).

    Wide float32 rows are multiplied in two halves, the even and the odd columns: shorter sums have smaller
    errors.
    """
    if a.dtype == tl.float32 and a.shape[1] > 128:
        a_even, a_odd = tl.split(tl.reshape(a, [a.shape[0], a.shape[1] // 2, 2]))
        b_even, b_odd = tl.split(tl.reshape(b, [b.shape[0], b.shape[1] // 2, 2]))
        # Scaled before they are added: the compiler would make one long sum of a sum of two products.
        scores = dot(a_even, tl.trans(b_even), None) * scale + dot(a_odd, tl.trans(b_odd), None) * scale
    else:
        scores = dot(a, tl.trans(b), None) * scale
    return scores


@triton.jit
def kept(seed_ptr, threshold, keep_scale, queries, first_key, head, sequence, BLOCK_N: tl.constexpr):
    """What dropout multiplies the weights (queries, keys) by, of BLOCK_N keys from first_key on."""
    return keep_factors(
        seed_ptr, threshold, keep_scale, queries, first_key, tl.float32, BLOCK_N, head, sequence
    )


@triton.jit
def kept_anywhere(seed_ptr, threshold, keep_scale, queries, keys, head, sequence):
    """Likewise for keys that begin anywhere: a call of Philox for each."""
    zero = tl.zeros([1, 1], tl.int32)
    word0, word1, word2, word3 = tl.philox(
        tl.load(seed_ptr), keys // 8 + zero, queries + zero, zero + head, zero + sequence
    )
    number = keys % 8 // 2
    low, high = tl.where(number == 0, word0, word1), tl.where(number == 2, word2, word3)
    word = tl.where(number < 2, low, high)
    bits = (word >> (keys % 2 * 16).to(tl.uint32)) & 0xFFFF
    return tl.where(bits.to(tl.int32) >= threshold, keep_scale, 0.0)


@triton.jit
def load_statistics(lse_ptr, delta_ptr, base, queries, n_q, unit: tl.constexpr):
    """lse in `unit` and delta of one block of queries.

    Where every score is -inf lse is 0 instead of -inf, because -inf - -inf would be NaN. Beyond n_q nothing
    needs masking: dout and delta are zero there.
    """
    lse = tl.load(lse_ptr + base + queries, mask=queries < n_q, other=0.0)
    delta = tl.load(delta_ptr + base + queries, mask=queries < n_q, other=0.0)
    return tl.where(lse == float("-inf"), 0.0, lse * unit), delta


@triton.jit
def offset_of(batch, stride_b, head, stride_h, token, stride_n, GRAIN: tl.constexpr):
    """Where a sequence of one head begins, in 64 bits: a tensor may hold more than 2^31 elements.

    Strides are counted in GRAIN elements, here and below, for the compiler to see how far they are aligned.
    """
    return (long(batch) * stride_b + long(head) * stride_h + long(token) * stride_n) * GRAIN


@triton.jit
def load(ptr, rows, n, stride_n, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr, GRAIN: tl.constexpr):
    """(len(rows), BLOCK_D) elements of one head, zero beyond (n, D)."""
    columns = tl.arange(0, BLOCK_D)
    offsets = rows[:, None].to(tl.int64) * (long(stride_n) * GRAIN) + columns[None, :].to(tl.int64) * stride_d
    mask = (rows < n)[:, None]
    if D < BLOCK_D:
        mask = mask & (columns < D)[None, :]
    return tl.load(ptr + offsets, mask=mask, other=0.0)


@triton.jit
def store(ptr, x, rows, n, stride_n, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr, GRAIN: tl.constexpr):
    """The inverse of `load`, rounding to the memory's dtype."""
    columns = tl.arange(0, BLOCK_D)
    offsets = rows[:, None].to(tl.int64) * (long(stride_n) * GRAIN) + columns[None, :].to(tl.int64) * stride_d
    mask = (rows < n)[:, None]
    if D < BLOCK_D:
        mask = mask & (columns < D)[None, :]
    tl.store(ptr + offsets, rounded(x, ptr.dtype.element_ty), mask=mask)


@triton.jit
def finite(x):
    """x with zero for NaN and infinity.

    A weight of zero times such an element would be NaN, and reach queries that do not see it. Where a NaN is
    seen, the score has carried it on already.
    """
    y = wide(x)
    return rounded(tl.where(tl.abs(y) < float("inf"), y, 0.0), x.dtype)


@triton.constexpr_function
def unit_of(dtype, biased):
    """What scores are counted in, as a factor of natural units.

    16-bit inputs: log2(e). exp2 is one instruction, and the factor goes into the scale. float32 inputs, or a
    bias, which may be -1e9 for all keys: 1, because the rounding error of lse * log2(e) grows with lse, and
    would be a relative error of the weights.
    """
    return 1.0 if dtype == tl.float32 or biased else LOG2_E.value


@triton.jit
def exp(scores, unit: tl.constexpr):
    """The exponential of scores or their differences, counted in `unit`."""
    if unit == 1.0:
        return tl.exp(scores)
    return tl.exp2(scores)


@triton.jit
def dot(a, b, acc):
    """a @ b + acc in float32; float32 operands are not shortened to TF32."""
    # The interpreter would multiply the raw bits of bfloat16.
    if INTERPRETED:
        a = wide(a)
        b = wide(b)
    return tl.dot(a, b, acc, input_precision="ieee")
