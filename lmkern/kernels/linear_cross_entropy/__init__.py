"""The cross-entropy of logits = x @ weight^T (+ bias), never holding them all.

A token's loss as in lmkern.kernels.cross_entropy. The contract of every backend:

    forward(x, weight, bias, targets, dloss, *, needs, ignore_index, label_smoothing, z_loss, softcap)
        -> (loss, dx, dweight, dbias)
    backward(dloss, x, weight, bias, targets, *, needs, ignore_index, label_smoothing, z_loss, softcap)
        -> (dx, dweight, dbias)

    x, dx             (R, E)    any strides; dx contiguous, x's dtype
    weight, dweight   (V, E)    likewise, x's dtype, but dweight float32 for float16, whose sums over all
                                tokens may pass its largest number before the loss's scale makes them small
    bias, dbias       (V,)      likewise, or None
    targets           (R,)      int64 in [0, V) or ignore_index, contiguous
    loss, dloss       (R,)      float32 (float64 for float64); dloss with any stride
    needs             three booleans: which of dx, dweight, dbias are wanted; the others come back as None

Both give the gradients of sum(dloss * loss): forward has a part of the logits at hand when it has computed
their loss, and backward has to compute them a second time. The logits and their gradient are in x's dtype;
every product is summed in at least float32.
Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989, section 3.2.
"""

BACKENDS = ("triton", "cpu", "reference")
