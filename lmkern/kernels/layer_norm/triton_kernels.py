"""The Triton kernels of the norms: layer norm, RMS norm, and either after dropout and a residual.

One family: a pointer that is None takes its part out of the kernel. Without mean_ptr the norm is RMS norm,
without residual_ptr (forward) or dh_ptr (backward) nothing is added, without seed_ptr nothing is dropped.
Imported on first use by lmkern/kernels/norm_triton.py, which launches them.
"""

# Triton compiles these functions; annotations would be read as types of arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type"

import triton
import triton.language as tl

from lmkern.kernels.triton_kernels import (
    compute_dtype,
    keep_factors,
    load_rows,
    rounded,
    sqrt,
    store_rows,
    wide,
)
from lmkern.kernels.triton_launch import kernel


@kernel(do_not_specialize=["R", "threshold"])
def forward_kernel(
    x_ptr, stride_x,  # (R, E), elements of a row contiguous
    residual_ptr, stride_residual,  # likewise; None: no residual
    weight_ptr, bias_ptr,  # (E,), each may be None
    y_ptr, h_ptr,  # (R, E) contiguous; h with a residual
    mean_ptr, rstd_ptr,  # (R,); mean None: RMS norm
    seed_ptr, threshold, keep_scale: tl.float64,  # (); None: no dropout
    R, E, eps: tl.float64, offset: tl.float64,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,  # power of two, at least E and 8: a program holds whole rows
):  # fmt: skip
    """One program per BLOCK_R rows.

        h    = residual + dropout(x), rounded to its memory's dtype; or x
        mean = sum(h) / E; 0 for RMS norm
        rstd = 1 / sqrt(sum((h - mean)^2) / E + eps)
        y    = (h - mean) * rstd * (offset + weight) + bias

    Reads x once into registers. Traffic: 2 R E elements (with a residual 4 R E) + 8 R bytes; weight and bias
    stay in L2. Ba et al. 2016, arXiv:1607.06450; Zhang and Sennrich 2019, arXiv:1910.07467. Backward:
    docs/kernels/layer_norm.md, docs/kernels/rms_norm.md.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_E)
    x = load_rows(x_ptr, rows, R, stride_x, columns, E)
    if residual_ptr is not None:
        if seed_ptr is not None:
            x *= keep_factors(seed_ptr, threshold, keep_scale, rows, 0, x.dtype, BLOCK_E)
        h = rounded(load_rows(residual_ptr, rows, R, stride_residual, columns, E) + x, h_ptr.dtype.element_ty)
        store_rows(h_ptr, h, rows, R, E, columns, E)
        x = wide(h)
    if mean_ptr is not None:
        mean = tl.sum(x, 1) / E
        # Padding is zero in x, so -mean in the difference: it must not count.
        x = tl.where((columns < E)[None, :], x - mean[:, None], 0.0)
        # What the mean's rounding left: rows that are nearly constant hold little else.
        left = tl.sum(x, 1) / E
        x = tl.where((columns < E)[None, :], x - left[:, None], 0.0)
        mean += left
        tl.store(mean_ptr + rows, mean, mask=rows < R)
    rstd = _reciprocal_root(tl.sum(x * x, 1) / E, eps)
    y = _shifted(x * rstd[:, None] * _factors(weight_ptr, offset, columns, E, x.dtype), bias_ptr, columns, E)
    store_rows(y_ptr, y, rows, R, E, columns, E)
    tl.store(rstd_ptr + rows, rstd, mask=rows < R)


@kernel(do_not_specialize=["R", "threshold"])
def wide_forward_kernel(
    x_ptr, stride_x,  # the arguments are forward_kernel's
    residual_ptr, stride_residual,
    weight_ptr, bias_ptr,
    y_ptr, h_ptr,
    mean_ptr, rstd_ptr,
    seed_ptr, threshold, keep_scale: tl.float64,
    R, E, eps: tl.float64, offset: tl.float64,
    BLOCK_R: tl.constexpr,  # 1
    BLOCK_E: tl.constexpr,  # power of two
):  # fmt: skip
    """`forward_kernel` for rows that registers do not hold: one program a row, which it reads twice.

    A lane follows its own columns' mean and sum of squares about it (Welford 1962), which are joined at the
    end: the variance is about the mean, and a row's columns are reduced twice in all.
    """
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, BLOCK_R)
    lanes = tl.arange(0, BLOCK_E)
    dtype: tl.constexpr = compute_dtype(rstd_ptr.dtype.element_ty)
    lane_mean = tl.zeros([BLOCK_R, BLOCK_E], dtype)
    squares = tl.zeros([BLOCK_R, BLOCK_E], dtype)
    for first in range(0, E, BLOCK_E):
        columns = first + lanes
        x = load_rows(x_ptr, rows, R, stride_x, columns, E)
        if residual_ptr is not None:
            if seed_ptr is not None:
                x *= keep_factors(seed_ptr, threshold, keep_scale, rows, first, x.dtype, BLOCK_E)
            h = rounded(
                load_rows(residual_ptr, rows, R, stride_residual, columns, E) + x, h_ptr.dtype.element_ty
            )
            store_rows(h_ptr, h, rows, R, E, columns, E)
            x = wide(h)
        if mean_ptr is not None:
            difference = tl.where((columns < E)[None, :], x - lane_mean, 0.0)
            lane_mean += difference / (first // BLOCK_E + 1)
            squares += difference * (x - lane_mean)
        else:
            squares += x * x
    mean = tl.zeros([BLOCK_R], dtype)
    if mean_ptr is not None:
        counts = ((E - lanes + BLOCK_E - 1) // BLOCK_E)[None, :]
        mean = tl.sum(lane_mean * counts, 1) / E
        # What the mean's rounding left.
        mean += tl.sum((lane_mean - mean[:, None]) * counts, 1) / E
        difference = lane_mean - mean[:, None]
        squares += counts * difference * difference
        tl.store(mean_ptr + rows, mean, mask=rows < R)
    rstd = _reciprocal_root(tl.sum(squares, 1) / E, eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < R)
    # Another thread may have written the part of h that this one is about to read.
    tl.debug_barrier()
    for first in range(0, E, BLOCK_E):
        columns = first + lanes
        if residual_ptr is not None:
            x = load_rows(h_ptr, rows, R, E, columns, E)
        else:
            x = load_rows(x_ptr, rows, R, stride_x, columns, E)
        y = (x - mean[:, None]) * rstd[:, None] * _factors(weight_ptr, offset, columns, E, dtype)
        y = _shifted(y, bias_ptr, columns, E)
        store_rows(y_ptr, y, rows, R, E, columns, E)


@kernel(do_not_specialize=["R", "threshold"])
def backward_kernel(
    dy_ptr, stride_dy,  # (R, E), elements of a row contiguous
    dh_ptr, stride_dh,  # likewise; None: 0
    h_ptr, stride_h,  # likewise
    weight_ptr,  # (E,), may be None
    mean_ptr, rstd_ptr,  # (R,); mean None: RMS norm
    dx_ptr, dresidual_ptr,  # (R, E) contiguous; None: not wanted
    dweight_ptr, dbias_ptr,  # (programs, E) partial sums; None: not wanted
    seed_ptr, threshold, keep_scale: tl.float64,  # (); None: no dropout
    R, E, offset: tl.float64,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,  # at least E and 8 where dx or dresidual is wanted
    STAGES: tl.constexpr,  # how many blocks of rows are on their way at once
):  # fmt: skip
    """Persistent programs: program p takes row blocks p, p + programs, p + 2 programs, ...

        h_hat     = (h - mean) * rstd
        dh_hat    = dy * (offset + weight)
        dresidual = (dh_hat - sum(dh_hat) / E - h_hat * sum(dh_hat * h_hat) / E) * rstd + dh
        dx        = dropout(dresidual)
        dweight   = sum over rows of dy * h_hat
        dbias     = sum over rows of dy

    RMS norm has neither mean nor sum(dh_hat) / E. dweight and dbias stay in registers from row to row; a
    column sum adds the partial sums of the programs. Traffic: 3 R E elements (with a residual 5 R E) + 8 R
    bytes, and 8 E bytes a program. Program (p, c) sums the c-th block of columns where only sums are wanted.
    """
    program = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    dtype: tl.constexpr = compute_dtype(rstd_ptr.dtype.element_ty)
    dweight = tl.zeros([BLOCK_R, BLOCK_E], dtype)
    dbias = tl.zeros([BLOCK_R, BLOCK_E], dtype)
    # Before the loop, or every row would bring it from L2 again.
    factors = _factors(weight_ptr, offset, columns, E, dtype)
    for first_row in tl.range(program * BLOCK_R, R, tl.num_programs(0) * BLOCK_R, num_stages=STAGES):
        rows = first_row + tl.arange(0, BLOCK_R)
        # Padding has dy = 0, which keeps it out of every sum.
        dy = load_rows(dy_ptr, rows, R, stride_dy, columns, E)
        h_hat, rstd = _normalised(h_ptr, stride_h, mean_ptr, rstd_ptr, rows, R, columns, E)
        if dweight_ptr is not None:
            dweight += dy * h_hat
        if dbias_ptr is not None:
            dbias += dy
        if dx_ptr is not None or dresidual_ptr is not None:
            dh = dy * factors
            along = tl.sum(dh * h_hat, 1)[:, None] / E
            if mean_ptr is not None:
                dh -= tl.sum(dh, 1)[:, None] / E
            dh = (dh - h_hat * along) * rstd
            _store_gradients(
                dx_ptr, dresidual_ptr, dh, dh_ptr, stride_dh, seed_ptr, threshold, keep_scale,
                rows, R, columns, E, 0, BLOCK_E,
            )  # fmt: skip
    partial = program * E + columns
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=columns < E)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=columns < E)


@kernel(do_not_specialize=["R", "threshold"])
def wide_backward_kernel(
    dy_ptr, stride_dy,  # the arguments are backward_kernel's; dweight and dbias are None
    dh_ptr, stride_dh,
    h_ptr, stride_h,
    weight_ptr,
    mean_ptr, rstd_ptr,
    dx_ptr, dresidual_ptr,
    dweight_ptr, dbias_ptr,
    seed_ptr, threshold, keep_scale: tl.float64,
    R, E, offset: tl.float64,
    BLOCK_R: tl.constexpr,  # 1
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dx and dresidual of rows that registers do not hold: one program a row, which it reads twice."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, BLOCK_R)
    lanes = tl.arange(0, BLOCK_E)
    dtype: tl.constexpr = compute_dtype(rstd_ptr.dtype.element_ty)
    along = tl.zeros([BLOCK_R, BLOCK_E], dtype)
    total = tl.zeros([BLOCK_R, BLOCK_E], dtype)
    for first in range(0, E, BLOCK_E):
        columns = first + lanes
        dy = load_rows(dy_ptr, rows, R, stride_dy, columns, E)
        h_hat, _ = _normalised(h_ptr, stride_h, mean_ptr, rstd_ptr, rows, R, columns, E)
        dh = dy * _factors(weight_ptr, offset, columns, E, dtype)
        along += dh * h_hat
        total += dh
    mean_along = tl.sum(along, 1)[:, None] / E
    mean_dh = tl.sum(total, 1)[:, None] / E
    for first in range(0, E, BLOCK_E):
        columns = first + lanes
        dy = load_rows(dy_ptr, rows, R, stride_dy, columns, E)
        h_hat, rstd = _normalised(h_ptr, stride_h, mean_ptr, rstd_ptr, rows, R, columns, E)
        dh = dy * _factors(weight_ptr, offset, columns, E, dtype)
        if mean_ptr is not None:
            dh -= mean_dh
        dh = (dh - h_hat * mean_along) * rstd
        _store_gradients(
            dx_ptr, dresidual_ptr, dh, dh_ptr, stride_dh, seed_ptr, threshold, keep_scale,
            rows, R, columns, E, first, BLOCK_E,
        )  # fmt: skip


@triton.jit
def _reciprocal_root(variance, eps):
    return 1.0 / sqrt(variance + tl.full((), eps, variance.dtype))


@triton.jit
def _factors(weight_ptr, offset, columns, E, dtype: tl.constexpr):
    """offset + weight as a row; 1 without a weight."""
    factors = tl.full((), 1.0, dtype)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=columns < E, other=0.0).to(dtype)
        factors = (weight + tl.full((), offset, dtype))[None, :]
    return factors


@triton.jit
def _shifted(x, bias_ptr, columns, E):
    """x + bias, where there is one."""
    if bias_ptr is not None:
        x += tl.load(bias_ptr + columns, mask=columns < E, other=0.0).to(x.dtype)[None, :]
    return x


@triton.jit
def _normalised(h_ptr, stride_h, mean_ptr, rstd_ptr, rows, R, columns, E):
    """h_hat = (h - mean) * rstd, and rstd as a column."""
    h = load_rows(h_ptr, rows, R, stride_h, columns, E)
    if mean_ptr is not None:
        h -= tl.load(mean_ptr + rows, mask=rows < R, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + rows, mask=rows < R, other=0.0)[:, None]
    return h * rstd, rstd


@triton.jit
def _store_gradients(
    dx_ptr, dresidual_ptr, dh, dh_ptr, stride_dh, seed_ptr, threshold, keep_scale,
    rows, R, columns, E, first_column, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dresidual, the gradient of the norm plus what came from elsewhere, and dx, its dropout."""
    if dh_ptr is not None:
        dh += load_rows(dh_ptr, rows, R, stride_dh, columns, E)
    if dresidual_ptr is not None:
        store_rows(dresidual_ptr, dh, rows, R, E, columns, E)
    if dx_ptr is not None:
        if seed_ptr is not None:
            dh *= keep_factors(seed_ptr, threshold, keep_scale, rows, first_column, dh.dtype, BLOCK_E)
        store_rows(dx_ptr, dh, rows, R, E, columns, E)
