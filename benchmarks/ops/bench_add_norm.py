"""Residual + dropout + layer norm in one pass against the same in eager torch and torch.compile."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contest import EAGER, Case, Compete, Contest, Inputs, Work
from lmkern.ops import add_norm
from lmkern.testing import NORM_GPU_SHAPES, LayerNormShape, layer_norm_inputs

OP = "add_norm"


@dataclass(frozen=True)
class AddNormCase(Case):
    """dropout_p: of x, before the residual is added."""

    dropout_p: float = 0.0


CASES = (
    AddNormCase(LayerNormShape(4096, 768)),
    AddNormCase(LayerNormShape(16384, 1024), main=True, kept_memory=True),
)
GPU_CASES = (
    *(
        AddNormCase(shape, note="dropout", dropout_p=0.1, dtypes=(torch.bfloat16,))
        for shape in NORM_GPU_SHAPES
    ),
    AddNormCase(NORM_GPU_SHAPES[0], main=True, dtypes=(torch.bfloat16,)),
)
QUICK_CASES = (
    AddNormCase(LayerNormShape(32, 48), main=True),
    AddNormCase(LayerNormShape(32, 48), note="dropout", dropout_p=0.1),
)


def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    h = residual + x
    return F.layer_norm(h, weight.shape, weight, bias), h


def eager_with_dropout(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, p: float
) -> tuple[Tensor, Tensor]:
    return eager(F.dropout(x, p), residual, weight, bias)


def bench_add_norm(
    case: AddNormCase,
    direction: str,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
    compete: Compete,
) -> None:
    x, weight, bias, dy = layer_norm_inputs(case.shape, dtype, device=str(device))
    residual, _, _, dh = layer_norm_inputs(case.shape, dtype, device=str(device), seed=1)
    leaves = (x, residual, weight, bias)
    p = case.dropout_p
    options = {"dropout_p": p, "dropout_seed": torch.tensor(1, device=device)} if p else {}
    compete(
        Contest(
            ours=partial(add_norm, **options, backend=backend),
            competitors={EAGER: partial(eager_with_dropout, p=p) if p else eager},
            eager="F.dropout, residual + x, F.layer_norm" if p else "residual + x, F.layer_norm",
            inputs=Inputs(leaves, leaves=leaves, gradients=(dy, dh)),
            work=work(case.shape, direction, dtype),
            # torch sums the gradients of bfloat16 weights in bfloat16.
            reference=partial(add_norm, **options, backend="reference"),
        )
    )


def work(shape: LayerNormShape, direction: str, dtype: torch.dtype) -> Work:
    """Per element: forward 8 operations, x, residual read and y, h written; backward 14, dy, dh, h and dx."""
    operations, tensors = {"forward": (8, 4), "backward": (14, 4), "both": (22, 8)}[direction]
    elements = shape.R * shape.E
    return Work(operations * elements, tensors * elements * dtype.itemsize + 8 * shape.R, "copy")
