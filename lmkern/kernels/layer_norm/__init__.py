"""Layer norm over the last dimension: y = (x - mean) * rstd * weight + bias, with rstd = 1 / sqrt(var + eps).

The contract of every backend. Ba et al. 2016, arXiv:1607.06450. Derivation: docs/kernels/layer_norm.md.

    forward(x, weight, bias, *, eps) -> (y, mean, rstd)
    backward(dy, x, weight, mean, rstd, *, needs) -> (dx, dweight, dbias)

    x, y, dy, dx        (R, E)    any row stride, elements of a row contiguous; results contiguous, x's dtype
    weight, bias        (E,)      contiguous, of one dtype: x's, or float32 beside a 16-bit x; may be None
    mean, rstd          (R,)      float32; float64 for float64 inputs
    dweight, dbias      (E,)      float32 (float64 for float64 inputs); ops casts to the parameter's dtype
    needs               three booleans: which of dx, dweight, dbias are wanted; the others come back as None

Sums are at least float32, those of dweight and dbias over the rows too.
"""

BACKENDS = ("cuda", "triton", "cpu", "reference")
