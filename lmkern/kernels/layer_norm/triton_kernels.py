"""The Triton kernels of layer norm. Imported on first use by triton.py, which launches them."""

# Triton compiles these functions; annotations would be read as types of arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["R"])
def forward_kernel(
    x_ptr, stride_x,  # (R, E), elements of a row contiguous
    weight_ptr, bias_ptr,  # (E,), each may be None
    y_ptr, mean_ptr, rstd_ptr,  # (R, E) contiguous, (R,), (R,)
    R, E, eps,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,  # power of two, at least E: a program holds whole rows
):  # fmt: skip
    """One program per BLOCK_R rows.

        mean = sum(x) / E
        rstd = 1 / sqrt(sum((x - mean)^2) / E + eps)
        y    = (x - mean) * rstd * weight + bias

    Reads x once into registers. Traffic: 2 R E elements + 8 R bytes; weight and bias stay in L2.
    Ba et al. 2016, arXiv:1607.06450. Backward: docs/kernels/layer_norm.md.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_E)
    inside = columns < E
    x = _load(x_ptr, rows, R, stride_x, columns, E)
    mean = tl.sum(x, 1) / E
    # Padding is zero in x, so -mean in the difference: it must not count.
    centred = tl.where(inside[None, :], x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / E + eps)
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y = y * tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    _store(y_ptr, y, rows, R, E, columns, E)
    tl.store(mean_ptr + rows, mean, mask=rows < R)
    tl.store(rstd_ptr + rows, rstd, mask=rows < R)


@triton.jit(do_not_specialize=["R"])
def backward_kernel(
    dy_ptr, stride_dy,  # (R, E), elements of a row contiguous
    x_ptr, stride_x,  # (R, E), elements of a row contiguous
    weight_ptr,  # (E,), may be None
    mean_ptr, rstd_ptr,  # (R,)
    dx_ptr,  # (R, E) contiguous; None: not wanted
    dweight_ptr, dbias_ptr,  # (programs, E) partial sums in float32; None: not wanted
    R, E,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Persistent programs: program p takes row blocks p, p + programs, p + 2 programs, ...

        x_hat   = (x - mean) * rstd
        dx_hat  = dy * weight
        dx      = (dx_hat - sum(dx_hat) / E - x_hat * sum(dx_hat * x_hat) / E) * rstd
        dweight = sum over rows of dy * x_hat
        dbias   = sum over rows of dy

    dweight and dbias stay in registers from row to row; a column sum adds the partial sums of the programs.
    Traffic: 3 R E elements + 8 R bytes, and 8 E bytes a program.
    """
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_E)
    inside = columns < E
    dweight = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    dbias = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    for first_row in range(program * BLOCK_R, R, tl.num_programs(0) * BLOCK_R):
        rows = first_row + tl.arange(0, BLOCK_R)
        dy = _load(dy_ptr, rows, R, stride_dy, columns, E)
        x = _load(x_ptr, rows, R, stride_x, columns, E)
        mean = tl.load(mean_ptr + rows, mask=rows < R, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < R, other=0.0)[:, None]
        # Padding has dy = 0, which keeps it out of every sum.
        x_hat = (x - mean) * rstd
        if dweight_ptr is not None:
            dweight += dy * x_hat
        if dbias_ptr is not None:
            dbias += dy
        if dx_ptr is not None:
            dx_hat = dy
            if weight_ptr is not None:
                dx_hat = dy * tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
            along = tl.sum(dx_hat * x_hat, 1)[:, None] / E
            dx = (dx_hat - tl.sum(dx_hat, 1)[:, None] / E - x_hat * along) * rstd
            _store(dx_ptr, dx, rows, R, E, columns, E)
    partial = program.to(tl.int64) * E + columns
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=inside)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=inside)


@triton.jit
def _load(ptr, rows, R, stride, columns, E):
    """(len(rows), len(columns)) elements in float32, zero beyond (R, E)."""
    pointers = ptr + rows[:, None].to(tl.int64) * stride + columns[None, :]
    return tl.load(pointers, mask=(rows < R)[:, None] & (columns < E)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, x, rows, R, stride, columns, E):
    """The inverse of `_load`, rounding to the memory's dtype."""
    pointers = ptr + rows[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=(rows < R)[:, None] & (columns < E)[None, :])
