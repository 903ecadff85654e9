"""AdamW on the CPU: csrc/adamw/cpu_step.cpp, called through csrc/adamw/params.hpp."""

from __future__ import annotations

import math
import struct

from torch import Tensor

from lmkern.kernels import native
from lmkern.kernels.cpu_call import DTYPE_CODES, pointer, unavailable, unsupported

__all__ = ["step", "unavailable", "unsupported"]

# AdamwParams: 5 pointers, count; 7 numbers; two dtypes, threads.
_PARAMS = struct.Struct("=6q 7d 3q")


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
    native.function("adamw_step", param.dtype)(
        _PARAMS.pack(
            *(pointer(tensor) for tensor in (param, grad, exp_avg, exp_avg_sq, copy)),
            param.numel(),
            1 - lr * weight_decay,
            1 - beta1,
            beta2,
            lr / (1 - beta1**step),
            math.sqrt(1 - beta2**step),
            eps,
            grad_scale,
            DTYPE_CODES[param.dtype],
            DTYPE_CODES[grad.dtype],
            native.threads(),
        )
    )
