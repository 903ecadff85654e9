"""A linear map of few rows: y = x @ weight^T (+ bias), the step of generation.

The contract of every backend.

    forward(x, weight, bias) -> y

    x       (R, K)    elements of a row contiguous, any row stride
    weight  (N, K)    elements of a row contiguous, any row stride; x's dtype
    bias    (N,)      contiguous, x's dtype; or None
    y       (R, N)    contiguous, x's dtype, summed in at least float32

GPUs have no kernel of ours here: torch's own product serves them.
"""

BACKENDS = ("cpu", "reference")
PASSES = ("forward",)
