"""Scaled dot-product attention: out = softmax(q @ k^T * softmax_scale) @ v, without holding the scores.

The contract of every backend. Derivation: docs/kernels/attention.md.

    forward(q, k, v, *, diagonal, softmax_scale) -> (out, lse)
    backward(dout, q, k, v, out, lse, dlse, *, diagonal, softmax_scale, needs) -> (dq, dk, dv)

    q, dout, out, dq    (B, H, N_q, D)      any strides in; results are laid out as torch.empty_like(q) is
    k, v, dk, dv        (B, H_kv, N_k, D)   H is a multiple of H_kv; query head h reads key/value head
                                            h // (H / H_kv)
    lse, dlse           (B, H, N_q)         log-sum-exp of each query's scores, natural log; float32, float64
                                            for float64 inputs; -inf for a query that sees no key; dlse may
                                            be None
    diagonal            query i sees the keys j <= i + diagonal; None: every key
    needs               three booleans: which of dq, dk, dv are wanted; the others come back as None

A query that sees no key has out = 0 and gives no gradient. Scores, statistics and sums are at least float32.
"""

BACKENDS = ("triton", "cpu", "reference")
