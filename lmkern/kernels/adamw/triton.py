"""AdamW on GPUs through Triton."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmkern.kernels import triton_runtime, tuning
from lmkern.kernels.triton_runtime import unavailable, unsupported

__all__ = ["NOTE", "constants", "step", "unavailable", "unsupported"]

NOTE = triton_runtime.NOTE

# Elements of a program, and the threads that share them.
BLOCK = 1024
NUM_WARPS = 4


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
    from lmkern.kernels.adamw import triton_kernels

    count = param.numel()
    options = constants(param.device, param.dtype.itemsize)
    if programs := -(-count // options["BLOCK"]):
        with triton_runtime.device_of(param):
            triton_kernels.step_kernel[(programs,)](
                param, grad, exp_avg, exp_avg_sq, copy, count,
                1 - lr * weight_decay, 1 - beta1, beta2, lr / (1 - beta1**step),
                math.sqrt(1 - beta2**step), eps, grad_scale, **options,
            )  # fmt: skip


@tuning.remembered
def constants(device: torch.device, itemsize: int) -> dict[str, int]:
    """The compile-time arguments of the kernel."""
    default = {"BLOCK": BLOCK, "num_warps": NUM_WARPS}
    return tuning.lookup("adamw", "step", tuning.architecture(device), str(itemsize), default)
