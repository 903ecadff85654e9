"""Device functions that the Triton kernels of several ops share. Imported by the ops' triton_kernels.py."""

# Triton compiles these functions; annotations would be read as types of arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from lmkern.kernels import triton_runtime

INTERPRETED = tl.constexpr(triton_runtime.interpreted())


@triton.constexpr_function
def compute_dtype(dtype):
    """What numbers of a dtype are computed in: float64 for float64, float32 for all others."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.jit
def long(number):
    """In 64 bits; the interpreter counts loops in Python's integers."""
    return tl.full((), 0, tl.int64) + number


# The interpreter cuts float32 off where it should round to bfloat16, and takes numbers under the smallest
# normal one for others: these two move the bits by hand there.


@triton.jit
def wide(x):
    """x in the dtype that it is computed in."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        y = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        y = x.to(compute_dtype(x.dtype))
    return y


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in another dtype, rounded to the nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype != tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        y = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(dtype)
    return y


@triton.jit
def load_rows(ptr, rows, R, stride, columns, E):
    """(len(rows), len(columns)) elements, wide, zero beyond (R, E); elements of a row contiguous."""
    pointers = ptr + rows[:, None].to(tl.int64) * stride + columns[None, :]
    return wide(tl.load(pointers, mask=(rows < R)[:, None] & (columns < E)[None, :], other=0.0))


@triton.jit
def store_rows(ptr, x, rows, R, stride, columns, E):
    """The inverse of `load_rows`, rounding to the memory's dtype."""
    pointers = ptr + rows[:, None].to(tl.int64) * stride + columns[None, :]
    inside = (rows < R)[:, None] & (columns < E)[None, :]
    tl.store(pointers, rounded(x, ptr.dtype.element_ty), mask=inside)


@triton.jit
def sqrt(x):
    """Rounded to the nearest."""
    if x.dtype == tl.float64:
        y = tl.sqrt(x)
    else:
        y = tl.sqrt_rn(x)
    return y


@triton.jit
def divide(x, y):
    """Two blocks' quotient rounded to the nearest; `/` of float32 is not."""
    if x.dtype == tl.float64:
        quotient = x / y
    else:
        quotient = tl.div_rn(x, y)
    return quotient


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) and its derivative, of an exponential that cannot overflow and without a difference."""
    e = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    return tl.where(x < 0, e * r, r), e * r * r


@triton.jit
def tanh(x):
    """1 - 2 / (e^2x + 1), and where that cancels Lambert's x / (1 + x^2 / (3 + x^2 / (5 + ...)))."""
    square = tl.where(tl.abs(x) < 0.5, x * x, 0.0)
    if x.dtype == tl.float64:
        # To the term with 15: what is left out is under 2^-62 of it.
        above = 2027025.0 + square * (270270.0 + square * (6930.0 + square * 36.0))
        below = 2027025.0 + square * (945945.0 + square * (51975.0 + square * (630.0 + square)))
    else:
        # To the term with 9: under 2^-33.
        above = 945.0 + square * (105.0 + square)
        below = 945.0 + square * (420.0 + square * 15.0)
    small = x * (above / below)
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    # Written so that NaN stays NaN.
    return tl.where(tl.abs(x) < 0.5, small, tl.where(x < 0, -large, large))


@triton.jit
def keep_factors(
    seed_ptr,
    threshold,
    keep_scale,
    rows,
    first_column,
    dtype: tl.constexpr,
    BLOCK_E: tl.constexpr,
    head=0,
    sequence=0,
):
    """What dropout multiplies rows by, from first_column (a multiple of 8) on: keep_scale or 0.

    (len(rows), BLOCK_E) of the elements that lmkern.kernels.philox.keep_mask keeps: Philox's counter is
    (column // 8, row, head, sequence), and a column takes 16 of its 128 bits.
    """
    blocks = first_column // 8 + tl.arange(0, BLOCK_E // 8)
    zero = tl.zeros([1, 1], tl.int32)
    word0, word1, word2, word3 = tl.philox(
        tl.load(seed_ptr), blocks[None, :], rows[:, None].to(tl.int32), zero + head, zero + sequence
    )
    # A join makes a new last dimension: they stand for the bits 2, 1 and 0 of a column's number.
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    bits = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [rows.shape[0], BLOCK_E])
    return tl.where(bits.to(tl.int32) >= threshold, tl.full((), keep_scale, dtype), tl.full((), 0.0, dtype))
