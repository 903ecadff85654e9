"""Dropout, the addition of a residual and a norm: h = residual + dropout(x), y = norm(h).

The contract of every backend. The norm is layer norm or RMS norm over the last dimension, with offset +
weight for weight; y is computed from h as it is stored. Derivation: docs/kernels/add_norm.md.

    forward(x, residual, weight, bias, options) -> (y, h, mean, rstd)
    backward(dy, dh, h, weight, mean, rstd, options, *, needs) -> (dx, dresidual, dweight, dbias)

    x, y, dy, dx               (R, E)    any row stride, elements of a row contiguous; results contiguous,
                                         x's dtype
    residual, h, dh, dresidual (R, E)    likewise; x's dtype, or float32 beside a 16-bit x; dh may be None
    weight, bias               (E,)      contiguous, of one dtype: x's, or float32 beside a 16-bit x; may be
                                         None; RMS norm has no bias
    mean, rstd                 (R,)      float32; float64 for float64 inputs; mean is None for RMS norm
    dweight, dbias             (E,)      float32 (float64 for float64 inputs); ops casts to the parameter's
                                         dtype
    needs                      four booleans: which gradients are wanted; the others come back as None. dx
                                         and dresidual may be one tensor.

Dropout multiplies x by keep_scale where lmkern.kernels.philox.keep_mask, of x's shape (R, E), keeps it and by
0 elsewhere. Sums are at least float32, those of dweight and dbias over the rows too.
"""

from lmkern.kernels.add_norm.options import Options

__all__ = ["BACKENDS", "Options"]

BACKENDS = ("cuda", "triton", "cpu", "reference")
