"""AdamW in eager torch: the specification that every other backend is compared with."""

from __future__ import annotations

import math

from torch import Tensor

from lmkern.kernels.anywhere import unavailable, unsupported

__all__ = ["step", "unavailable", "unsupported"]


def step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
) -> None:
    g = grad.to(exp_avg.dtype) * grad_scale
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step) + eps
    decayed = param.to(exp_avg.dtype) * (1 - lr * weight_decay)
    updated = decayed.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
    param.copy_(updated)
    if copy is not None:
        copy.copy_(updated)
