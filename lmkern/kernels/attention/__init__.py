"""Scaled dot-product attention: out = softmax(scores) @ v, without holding the scores.

The contract of every backend. Derivation: docs/kernels/attention.md.

    forward(q, k, v, options) -> (out, lse)
    backward(dout, q, k, v, out, lse, dlse, options, *, needs) -> (dq, dk, dv, dbias, drelative_bias, dsinks)

    q, dout, out, dq    (B, H, N_q, D)      any strides in; results are laid out as torch.empty_like(q) is
    k, v, dk, dv        (B, H_kv, N_k, D)   H is a multiple of H_kv; query head h reads key/value head
                                            h // (H / H_kv)
    lse, dlse           (B, H, N_q)         log-sum-exp of each query's scores, natural log; float32, float64
                                            for float64 inputs; -inf for a query that sees no key and has no
                                            sink; dlse may be None
    options             Options (options.py): how scores are made, and which keys are seen
    needs               six booleans: which gradients are wanted; the others come back as None

A query that sees no key has out = 0 and gives no gradient to q, k and v. Scores, statistics and sums are at
least float32.
"""

from lmkern.kernels.attention.options import Options

BACKENDS = ("cuda", "triton", "cpu", "reference")

__all__ = ["BACKENDS", "Options"]
