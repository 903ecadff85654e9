"""A linear map, y = x @ weight^T (+ bias), where we have what torch lacks: few rows, the step of generation,
and 16 bits on a CPU without instructions for them.

The contract of every backend.

    forward(x, weight, bias) -> y
    backward(dy, x, weight, *, needs) -> dx, dweight, dbias    of cpu; torch differentiates the reference

    x       (..., K)  contiguous; or (R, K), elements of a row contiguous, any row stride
    weight  (N, K)    elements of a row contiguous, any row stride; x's dtype
    bias    (N,)      contiguous, x's dtype; or None
    y       (..., N)  contiguous, x's dtype, summed in at least float32
    needs   three flags; a gradient that nobody asked for is None

The option "gradient" of a call says whether one is wanted.

GPUs have no kernel of ours here: torch's own product serves them.
"""

import torch

BACKENDS = ("cpu", "reference")
PASSES = ("forward",)

# Up to so many rows reading the weight is the work, and torch's product is slower; beyond it is faster
# (LOG.md has the times). bfloat16's multiplies pairs at once.
MOST_ROWS = {torch.float32: 8, torch.bfloat16: 4, torch.float16: 16}
