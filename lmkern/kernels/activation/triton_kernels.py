"""The Triton kernels of the activations. Imported on first use by triton.py, which launches them."""

# Triton compiles these functions; annotations would be read as types of arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from lmkern.kernels.triton_kernels import compute_dtype, load_rows, sigmoid, store_rows
from lmkern.kernels.triton_launch import kernel

# k(t) of _normal_tail with c = 0.264, by powers of t: as in csrc/simd/elementary.hpp, to 1.4e-8.
TAIL = tl.constexpr(
    (
        0.1053447488, 0.1048060747, 0.1027300920, 0.0586007583, 0.1422694502, -0.1229712889, 0.2244788131,
        -0.1460516303, 0.0307929752,
    )
)  # fmt: skip
# By powers of t moved from [1 / (1 + 40 c), 1] to [-1, 1]: interpolation at Chebyshev's nodes, to 1.2e-16.
TAIL_DOUBLE = tl.constexpr(
    (
        0.21253132219074286, 0.15843712227008602, 0.08831135606759305, 0.0343974132881995,
        0.007406558579369353, -0.00039236197827425634, -0.0006981228475719407, -6.196620560790087e-05,
        6.728344894409647e-05, 9.393956490694684e-06, -8.234350042477356e-06, -7.944464532004738e-07,
        1.187045372615614e-06, -3.1585831035836645e-08, -1.7204822455577132e-07, 3.5994206631851285e-08,
        2.0843891707434572e-08, -1.0370079386559903e-08, -1.560645348327807e-09, 1.8627691468421668e-09,
        1.8952193081226227e-11, -1.7388780497445847e-10,
    )
)  # fmt: skip


@kernel(do_not_specialize=["R"])
def forward_kernel(
    x_ptr, stride_x,  # (R, F), gated (R, 2 F): gate, then value; elements of a row contiguous
    bias_ptr,  # (F,) or (2 F,); None: 0
    y_ptr,  # (R, F) contiguous
    R, F,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """y = f(x + bias), gated f(gate) * value: one program per BLOCK_R rows and BLOCK_F columns.

    Traffic: 2 R F elements, gated 3 R F.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    y, _ = _function(_biased(x_ptr, stride_x, bias_ptr, 0, rows, R, columns, F), FUNCTION)
    if GATED:
        y *= _biased(x_ptr, stride_x, bias_ptr, F, rows, R, columns, F)
    store_rows(y_ptr, y, rows, R, F, columns, F)


@kernel(do_not_specialize=["R"])
def backward_kernel(
    dy_ptr, stride_dy,  # (R, F), elements of a row contiguous
    x_ptr, stride_x,  # (R, F), gated (R, 2 F), elements of a row contiguous
    bias_ptr,  # (F,) or (2 F,); None: 0
    dx_ptr,  # contiguous; None: not wanted
    dbias_ptr,  # (programs, F) or (programs, 2 F) partial sums; None: not wanted
    R, F,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Program (p, c) takes the c-th block of columns of the row blocks p, p + programs, ...

        dgate = dy * value * f'(gate),    dvalue = dy * f(gate);    dx = dy * f'(x + bias) where nothing gates

    The sums of dbias stay in registers from row to row. Traffic: 3 R F elements, gated 5 R F.
    """
    program = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    width = 2 * F if GATED else F
    dtype: tl.constexpr = compute_dtype(x_ptr.dtype.element_ty)
    dbias = tl.zeros([BLOCK_R, BLOCK_F], dtype)
    dbias_value = tl.zeros([BLOCK_R, BLOCK_F], dtype)
    for first_row in range(program * BLOCK_R, R, tl.num_programs(0) * BLOCK_R):
        rows = first_row + tl.arange(0, BLOCK_R)
        # Padding has dy = 0 and a finite slope, which keeps it out of every sum.
        dy = load_rows(dy_ptr, rows, R, stride_dy, columns, F)
        f, slope = _function(_biased(x_ptr, stride_x, bias_ptr, 0, rows, R, columns, F), FUNCTION)
        dx = dy * slope
        if GATED:
            dx *= _biased(x_ptr, stride_x, bias_ptr, F, rows, R, columns, F)
            dvalue = dy * f
            dbias_value += dvalue
            if dx_ptr is not None:
                store_rows(dx_ptr + F, dvalue, rows, R, width, columns, F)
        dbias += dx
        if dx_ptr is not None:
            store_rows(dx_ptr, dx, rows, R, width, columns, F)
    if dbias_ptr is not None:
        partial = program * width + columns
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=columns < F)
        if GATED:
            tl.store(dbias_ptr + partial + F, tl.sum(dbias_value, 0), mask=columns < F)


@triton.jit
def _biased(x_ptr, stride_x, bias_ptr, first_column, rows, R, columns, F):
    """x + bias of F columns from first_column on."""
    x = load_rows(x_ptr + first_column, rows, R, stride_x, columns, F)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + first_column + columns, mask=columns < F, other=0.0).to(x.dtype)[None, :]
    return x


@triton.jit
def _function(x, FUNCTION: tl.constexpr):
    """f(x) and its derivative. Derivations: docs/kernels/activation.md."""
    if FUNCTION == "gelu":
        kernel, tail = _normal_tail(x)
        below = tl.where(x < 0, tail, 1.0 - tail)
        y = x * below
        # 1 / sqrt(2 pi) times e^(-x^2 / 2)
        slope = below + x * (kernel * 0.3989422804014327)
    elif FUNCTION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u), and 2 sqrt(2 / pi) = 1.5957...
        share, rise = sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y = x * share
        slope = share + x * rise * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    elif FUNCTION == "silu":
        share, rise = sigmoid(x)
        y = x * share
        slope = share + x * rise
    elif FUNCTION == "relu":
        # Written so that NaN stays NaN.
        y = tl.where(x <= 0, 0.0, x)
        slope = tl.where(x <= 0, 0.0, 1.0).to(x.dtype)
    else:
        positive = tl.where(x <= 0, 0.0, x)
        y = positive * positive
        slope = 2.0 * positive
    return y, slope


@triton.jit
def _normal_tail(x):
    """e^(-x^2 / 2) and P(X > |x|) of a standard normal X.

    The tail is a power series under the kernel, which keeps the relative accuracy that 1 - erf(x) loses:

        P(X > |x|) = e^(-x^2 / 2) t k(t),    t = 1 / (1 + c |x|)

    (the form of Abramowitz and Stegun 7.1.26).
    """
    # Beyond 40 both are 0; an infinity would make 0 * infinity.
    size = tl.where(tl.abs(x) > 40.0, 40.0, tl.abs(x))
    kernel = tl.exp(-0.5 * size * size)
    t = 1.0 / (1.0 + 0.264 * size)
    if x.dtype == tl.float64:
        series = _polynomial(2.1893939393939394 * (t - 0.5432525951557093), TAIL_DOUBLE, 22)
    else:
        series = _polynomial(t, TAIL, 9)
    return kernel, kernel * t * series


@triton.jit
def _polynomial(x, COEFFICIENTS: tl.constexpr, TERMS: tl.constexpr):
    """COEFFICIENTS[0] + COEFFICIENTS[1] x + ..., TERMS of them."""
    y = tl.full(x.shape, COEFFICIENTS[TERMS - 1], x.dtype)
    for i in tl.static_range(TERMS - 1):
        y = y * x + COEFFICIENTS[TERMS - 2 - i]
    return y
