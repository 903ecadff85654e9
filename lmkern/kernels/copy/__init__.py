"""Copies into another dtype, into the transposed order, or into both at once.

The contract of every backend.

    forward(x, *, dtype, transposed) -> y
    backward(dy, *, dtype, transposed) -> dx

    x       any shape and strides; transposed (..., R, C)
    y       x's shape, and x's strides if x is dense (torch.empty_like); transposed (..., C, R) contiguous

Values are rounded once, to the nearest; numbers under the smallest normal float32 may come as zero. Backward
is the same copy of dy into x's dtype.
"""

BACKENDS = ("triton", "cpu", "reference")

# The public functions of the op.
PUBLIC = ("cast", "transposed_copy")
