"""Cross-entropy of logits with one right class each. Derivation: docs/kernels/cross_entropy.md.

With z = logits, or softcap * tanh(logits / softcap) where softcap is not 0, lse = log sum_j exp z_j and
s = label_smoothing, a token's loss is

    loss = lse - (1 - s) z[target] - s mean_j(z_j) + z_loss * lse^2

and 0 for a target of ignore_index, whose logits are not read and whose gradients are 0.

The contract of every backend:

    forward(logits, targets, *, ignore_index, label_smoothing, z_loss, softcap)
        -> (loss, row_max, log_sum)
    backward(dloss, logits, targets, row_max, log_sum, *, ignore_index, label_smoothing, z_loss, softcap)
        -> dlogits

    logits, dlogits   (R, V)   any row stride, a row's elements contiguous; dlogits contiguous, logits' dtype
    targets           (R,)     int64 in [0, V) or ignore_index, contiguous
    row_max           (R,)     the largest z
    log_sum           (R,)     log sum_j exp(z_j - row_max); lse = row_max + log_sum
    loss, dloss       (R,)     these and the two above are float32, float64 for float64; dloss with any stride

Sums are at least float32. The statistics of an ignored token are 0. They are two, because lse rounded to one
number would give all weights of a token an error in common, of |lse| / 2 units in the last place.
"""

BACKENDS = ("triton", "cpu", "reference")
