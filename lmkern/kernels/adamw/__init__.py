"""One step of AdamW in place. Loshchilov & Hutter 2019, arXiv:1711.05101; as torch.optim.AdamW computes it.

    g = grad * grad_scale
    exp_avg    += (1 - beta1) (g - exp_avg)
    exp_avg_sq  = beta2 exp_avg_sq + (1 - beta2) g^2
    param       = (1 - lr weight_decay) param
                  - lr / (1 - beta1^step) exp_avg / (sqrt(exp_avg_sq) / sqrt(1 - beta2^step) + eps)

The contract of every backend. Derivation: docs/kernels/adamw.md.

    step(param, grad, exp_avg, exp_avg_sq, copy, *, lr, beta1, beta2, eps, weight_decay, step, grad_scale)

    param                   any shape, dense (no gaps and no overlaps), updated
    grad                    the same shape and strides, of any dtype beside it but float64 with float64 alone
    exp_avg, exp_avg_sq     the same shape and strides, float32 (float64 for float64), updated
    copy                    the same shape and strides, bfloat16: the new param once more; or None
    step                    1 for the first step

Computed in float32 (float64 for float64) and rounded once, when param is stored.
"""

BACKENDS = ("triton", "cpu", "reference")

# The public functions of the op, and the functions of a backend.
PUBLIC = ("adamw_",)
PASSES = ("step",)
