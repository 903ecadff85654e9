"""The Triton kernels of embedding. Imported on first use by triton.py, which launches them."""

# Triton compiles these functions; annotations would be read as types of arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton.language as tl

from lmkern.kernels.triton_kernels import compute_dtype, load_rows, rounded, store_rows
from lmkern.kernels.triton_launch import kernel


@kernel(do_not_specialize=["N"])
def forward_kernel(
    tokens_ptr,  # (N,) int64
    weight_ptr,  # (V, E) contiguous
    y_ptr,  # (N, E) contiguous
    N, V, E,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Rows of weight by token: one program per BLOCK_N tokens and BLOCK_E columns.

    A token out of range gives a row of NaN. Traffic: 2 N E elements + 8 N bytes.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    token = tl.load(tokens_ptr + rows, mask=rows < N, other=-1)
    known = ((token >= 0) & (token < V))[:, None] & (columns < E)[None, :]
    y = tl.load(weight_ptr + token[:, None] * E + columns[None, :], mask=known, other=float("nan"))
    store_rows(y_ptr, y, rows, N, E, columns, E)


@kernel
def backward_kernel(
    dy_ptr, stride_dy,  # (N, E), elements of a row contiguous
    order_ptr,  # (N,) int64: where the tokens stand, sorted by token and then by place
    starts_ptr,  # (V + 1,) int64: the first of each token's places in order
    dweight_ptr,  # (V, E) contiguous
    V, E, padding_idx,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program per row of dweight and BLOCK_E columns, which sums the rows of dy in a fixed order.

    Lane k of BLOCK_N sums the token's places k, k + BLOCK_N, ...; the lanes are summed at the end. Traffic:
    N E + V E elements + 8 (N + V) bytes.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    dtype: tl.constexpr = compute_dtype(dy_ptr.dtype.element_ty)
    first = tl.load(starts_ptr + token)
    last = tl.load(starts_ptr + token + 1)
    last = tl.where(token == padding_idx, first, last)
    sums = tl.zeros([BLOCK_N, BLOCK_E], dtype)
    for place in range(first, last, BLOCK_N):
        places = place + tl.arange(0, BLOCK_N)
        rows = tl.load(order_ptr + places, mask=places < last, other=0)
        # A row beyond the last is one beyond a count of none.
        count = tl.where(places < last, rows + 1, 0)
        sums += load_rows(dy_ptr, rows, count, stride_dy, columns, E)
    dweight = rounded(tl.sum(sums, 0), dweight_ptr.dtype.element_ty)
    tl.store(dweight_ptr + token * E + columns, dweight, mask=columns < E)
