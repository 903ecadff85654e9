"""Activations with their bias, gated or not.

    y = f(x + bias)        or, gated,        y = f(gate) * value,    gate, value the halves of x + bias

The contract of every backend. Derivation: docs/kernels/activation.md.

    forward(x, bias, *, function, gated) -> y
    backward(dy, x, bias, *, function, gated, needs) -> (dx, dbias)

    x, dx           (R, W)    W = F, gated 2F: the gate in the first F columns, the value in the last
    y, dy           (R, F)    any row stride, elements of a row contiguous; results contiguous, x's dtype
    bias, dbias     (W,)      contiguous; float32 (float64 for float64 inputs); bias may be None
    function        a name of FUNCTIONS
    needs           two booleans: which of dx and dbias are wanted; the others come back as None

Only x and bias are kept for the backward pass. Computed in at least float32, sums over the rows too.
"""

BACKENDS = ("triton", "cpu", "reference")

# The public functions of the op.
PUBLIC = ("activation", "geglu", "gelu", "swiglu")

FUNCTIONS = ("gelu", "gelu_tanh", "silu", "relu", "relu_squared")
