"""The Triton kernel of AdamW. Imported on first use by triton.py, which launches it."""

# Triton compiles these functions; annotations would be read as types of arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type"

import triton.language as tl

from lmkern.kernels.triton_kernels import divide, rounded, sqrt, wide
from lmkern.kernels.triton_launch import kernel


@kernel
def step_kernel(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr,  # (count,)
    copy_ptr,  # (count,) bfloat16; None: no copy
    count,
    decay: tl.float64,  # 1 - lr weight_decay
    rise: tl.float64,  # 1 - beta1
    beta2: tl.float64,
    rate: tl.float64,  # lr / (1 - beta1^step)
    correction: tl.float64,  # sqrt(1 - beta2^step)
    eps: tl.float64,
    grad_scale: tl.float64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK elements. The formulas are those of lmkern/kernels/adamw/__init__.py.

    Traffic, everything float32: 28 bytes an element.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    exp_avg = tl.load(exp_avg_ptr + at, mask=inside, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0.0)
    dtype: tl.constexpr = exp_avg.dtype
    grad = wide(tl.load(grad_ptr + at, mask=inside, other=0.0)) * tl.full((), grad_scale, dtype)
    exp_avg += tl.full((), rise, dtype) * (grad - exp_avg)
    share = tl.full((), beta2, dtype)
    exp_avg_sq = share * exp_avg_sq + (1.0 - share) * grad * grad
    correction_block = tl.full([BLOCK], correction, dtype)
    denominator = divide(sqrt(exp_avg_sq), correction_block) + tl.full((), eps, dtype)
    param = wide(tl.load(param_ptr + at, mask=inside, other=0.0)) * tl.full((), decay, dtype)
    param -= tl.full((), rate, dtype) * divide(exp_avg, denominator)
    tl.store(exp_avg_ptr + at, exp_avg, mask=inside)
    tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=inside)
    tl.store(param_ptr + at, rounded(param, param_ptr.dtype.element_ty), mask=inside)
    if copy_ptr is not None:
        tl.store(copy_ptr + at, rounded(param, tl.bfloat16), mask=inside)
