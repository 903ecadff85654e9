"""RMS norm over the last dimension: y = x * rstd * (offset + weight), with rstd = 1 / sqrt(mean(x^2) + eps).

The contract of every backend. Zhang and Sennrich 2019, arXiv:1910.07467. Derivation:
docs/kernels/rms_norm.md.

    forward(x, weight, *, eps, offset) -> (y, rstd)
    backward(dy, x, weight, rstd, *, offset, needs) -> (dx, dweight)

    x, y, dy, dx        (R, E)    any row stride, elements of a row contiguous; results contiguous, x's dtype
    weight              (E,)      contiguous, x's dtype, or float32 beside a 16-bit x; None: no factor at all
    rstd                (R,)      float32; float64 for float64 inputs
    dweight             (E,)      float32 (float64 for float64 inputs); ops casts to the parameter's dtype
    needs               two booleans: which of dx and dweight are wanted; the others come back as None

Sums are at least float32, that of dweight over the rows too.
"""

BACKENDS = ("cuda", "triton", "cpu", "reference")
