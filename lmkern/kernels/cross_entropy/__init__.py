"""Cross-entropy of logits with one right class each. Derivation: docs/kernels/cross_entropy.md.

With z = logits, or softcap * tanh(logits / softcap) where softcap is not 0, lse = log sum_j exp z_j and
s = label_smoothing, a token's loss is

    loss = lse - (1 - s) z[target] - s mean_j(z_j) + z_loss * lse^2

and 0 for a target of ignore_index, whose logits are not read and whose gradients are 0.

The contract of every backend:

    forward(logits, targets, *, ignore_index, label_smoothing, z_loss, softcap) -> (loss, lse)
    backward(dloss, logits, targets, lse, *, ignore_index, label_smoothing, z_loss, softcap) -> dlogits

    logits, dlogits   (R, V)   any row stride, a row's elements contiguous; dlogits contiguous, logits' dtype
    targets           (R,)     int64 in [0, V) or ignore_index, contiguous
    loss, lse, dloss  (R,)     float32; float64 for float64 logits; dloss with any stride

Sums are at least float32. lse of an ignored token is 0.
"""

BACKENDS = ("cpu", "reference")
