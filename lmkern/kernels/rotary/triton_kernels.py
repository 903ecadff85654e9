"""The Triton kernel of rotary positions. Imported on first use by triton.py, which launches it."""

# Triton compiles these functions; annotations would be read as types of arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton.language as tl

from lmkern.kernels.triton_kernels import long, rounded, wide
from lmkern.kernels.triton_launch import kernel

# Values that change from call to call: the kernel is not compiled again for them.
RUNTIME = [
    "N",
    "P",
    "offset",
    "token_blocks",
    *(f"stride_{tensor}{dimension}" for tensor in "xy" for dimension in "bhn"),
]


@kernel(do_not_specialize=RUNTIME)
def forward_kernel(
    x_ptr, stride_xb, stride_xh, stride_xn, stride_xd,  # (B, H, N, D)
    y_ptr, stride_yb, stride_yh, stride_yn, stride_yd,  # (B, H, N, D); may be x
    cos_ptr, sin_ptr, stride_table,  # (P, pairs), elements of a row contiguous
    positions_ptr,  # (B, N) contiguous; None: token n stands at offset + n
    H, N, D, P, pairs, offset, token_blocks, sign,
    GRAIN: tl.constexpr,  # elements that strides but the last are counted in
    INTERLEAVED: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,  # power of two, at least pairs
    BLOCK_REST: tl.constexpr,  # power of two, at least D - 2 pairs; 0: no columns to copy
):  # fmt: skip
    """One program per head and BLOCK_N tokens.

        y1 = x1 cos - x2 sin sign,    y2 = x2 cos + x1 sin sign

    A program writes what it has read, so y may be x. Traffic: 2 B H N D elements; cos and sin stay in L2. A
    position out of range makes its token NaN.
    """
    program = tl.program_id(0).to(tl.int64)
    tokens = (program % token_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = program // token_blocks % H
    sequence = program // token_blocks // H
    there = tokens < N
    if positions_ptr is not None:
        positions = tl.load(positions_ptr + sequence * N + tokens, mask=there, other=0)
    else:
        positions = tokens + offset
    pair = tl.arange(0, BLOCK_P)
    turning = there[:, None] & (pair < pairs)[None, :]
    known = turning & ((positions >= 0) & (positions < P))[:, None]
    at = positions[:, None] * stride_table + pair[None, :]
    x_ptr += (sequence * stride_xb + head * stride_xh) * GRAIN
    y_ptr += (sequence * stride_yb + head * stride_yh) * GRAIN
    x_row = x_ptr + tokens[:, None] * (long(stride_xn) * GRAIN)
    y_row = y_ptr + tokens[:, None] * (long(stride_yn) * GRAIN)
    if INTERLEAVED:
        columns = tl.arange(0, 2 * BLOCK_P)
        inside = there[:, None] & (columns < 2 * pairs)[None, :]
        x = wide(tl.load(x_row + columns[None, :] * stride_xd, mask=inside, other=0.0))
        x1, x2 = tl.split(tl.reshape(x, [BLOCK_N, BLOCK_P, 2]))
    else:
        x1 = wide(tl.load(x_row + pair[None, :] * stride_xd, mask=turning, other=0.0))
        x2 = wide(tl.load(x_row + (pair + pairs)[None, :] * stride_xd, mask=turning, other=0.0))
    c = tl.load(cos_ptr + at, mask=known, other=float("nan")).to(x1.dtype)
    s = tl.load(sin_ptr + at, mask=known, other=float("nan")).to(x1.dtype) * sign
    y1 = rounded(x1 * c - x2 * s, y_ptr.dtype.element_ty)
    y2 = rounded(x2 * c + x1 * s, y_ptr.dtype.element_ty)
    if INTERLEAVED:
        y = tl.reshape(tl.join(y1, y2), [BLOCK_N, 2 * BLOCK_P])
        tl.store(y_row + columns[None, :] * stride_yd, y, mask=inside)
    else:
        tl.store(y_row + pair[None, :] * stride_yd, y1, mask=turning)
        tl.store(y_row + (pair + pairs)[None, :] * stride_yd, y2, mask=turning)
    if BLOCK_REST and not IN_PLACE:
        rest = 2 * pairs + tl.arange(0, BLOCK_REST)
        inside_rest = there[:, None] & (rest < D)[None, :]
        copied = tl.load(x_row + rest[None, :] * stride_xd, mask=inside_rest)
        tl.store(y_row + rest[None, :] * stride_yd, copied, mask=inside_rest)
