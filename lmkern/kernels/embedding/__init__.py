"""Rows of a weight by token, and the sums of their gradients.

    y[i] = weight[tokens[i]],    dweight[v] = sum over the i with tokens[i] = v of dy[i]

The contract of every backend.

    forward(tokens, weight) -> y
    backward(dy, tokens, *, vocabulary, padding_idx) -> dweight

    tokens      (N,)      int64, contiguous; forward raises IndexError unless each lies in [0, V),
                          where lmkern.kernels.checked looks
    weight      (V, E)    contiguous
    y           (N, E)    contiguous, weight's dtype
    dy          (N, E)    any row stride, elements of a row contiguous; weight's dtype
    dweight     (V, E)    contiguous, dy's dtype, summed in at least float32 in the order of i
    padding_idx           the row of dweight that stays zero, or -1
"""

BACKENDS = ("triton", "cpu", "reference")
