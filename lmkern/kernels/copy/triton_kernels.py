"""The Triton kernels of the copies. Imported on first use by triton.py, which launches them."""

# Triton compiles these functions; annotations would be read as types of arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton.language as tl

from lmkern.kernels.triton_kernels import rounded
from lmkern.kernels.triton_launch import kernel


@kernel(do_not_specialize=["count"])
def flat_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    """One program per BLOCK elements of two tensors that lie alike. Traffic: one read and one write."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count)
    tl.store(y_ptr + at, rounded(x, y_ptr.dtype.element_ty), mask=at < count)


@kernel(do_not_specialize=["B", "R"])
def tile_kernel(
    x_ptr, stride_xb, stride_xr, stride_xc,  # (B, R, C)
    y_ptr,  # (B, R, C) contiguous, transposed (B, C, R)
    B, R, C,
    TRANSPOSED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per tile, read in x's order and written in y's. Traffic: one read and one write."""
    row_blocks = tl.cdiv(R, BLOCK_R)
    column_blocks = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    batch = program // column_blocks // row_blocks
    rows = program // column_blocks % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = program % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    x_ptr += batch * stride_xb
    y_ptr += batch * R * C
    inside = (rows < R)[:, None] & (columns < C)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xr + columns[None, :] * stride_xc, mask=inside)
    y = rounded(x, y_ptr.dtype.element_ty)
    if TRANSPOSED:
        inside_out = (columns < C)[:, None] & (rows < R)[None, :]
        tl.store(y_ptr + columns[:, None] * R + rows[None, :], tl.trans(y), mask=inside_out)
    else:
        tl.store(y_ptr + rows[:, None] * C + columns[None, :], y, mask=inside)
