"""Residual + dropout + layer norm in one pass against the same in eager torch and torch.compile."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contest import EAGER, Case, Compete, Contest, Inputs, Work
from lmkern.ops import add_norm
from lmkern.testing import LayerNormShape, layer_norm_inputs

OP = "add_norm"
CASES = (Case(LayerNormShape(4096, 768)), Case(LayerNormShape(16384, 1024), main=True, kept_memory=True))
QUICK_CASES = (Case(LayerNormShape(32, 48), main=True),)


def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    h = residual + x
    return F.layer_norm(h, weight.shape, weight, bias), h


def bench_add_norm(
    case: Case, direction: str, dtype: torch.dtype, backend: str, device: torch.device, compete: Compete
) -> None:
    x, weight, bias, dy = layer_norm_inputs(case.shape, dtype, device=str(device))
    residual, _, _, dh = layer_norm_inputs(case.shape, dtype, device=str(device), seed=1)
    leaves = (x, residual, weight, bias)
    compete(
        Contest(
            ours=partial(add_norm, backend=backend),
            competitors={EAGER: eager},
            eager="residual + x, F.layer_norm",
            inputs=Inputs(leaves, leaves=leaves, gradients=(dy, dh)),
            work=work(case.shape, direction, dtype),
            # torch sums the gradients of bfloat16 weights in bfloat16.
            reference=partial(add_norm, backend="reference"),
        )
    )


def work(shape: LayerNormShape, direction: str, dtype: torch.dtype) -> Work:
    """Per element: forward 8 operations, x, residual read and y, h written; backward 14, dy, dh, h and dx."""
    operations, tensors = {"forward": (8, 4), "backward": (14, 4), "both": (22, 8)}[direction]
    elements = shape.R * shape.E
    return Work(operations * elements, tensors * elements * dtype.itemsize + 8 * shape.R, "copy")
