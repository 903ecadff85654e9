"""A language model's head and loss against eager torch and torch.compile, forward and backward together."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contest import EAGER, Case, Compete, Contest, Inputs, Work
from lmkern.ops import linear_cross_entropy
from lmkern.testing import (
    LINEAR_CROSS_ENTROPY_BENCHMARK_SHAPES,
    LinearCrossEntropyShape,
    linear_cross_entropy_inputs,
)

OP = "linear_cross_entropy"
# The gradients are computed in the forward pass.
BOTH = ("both",)
MAIN = LINEAR_CROSS_ENTROPY_BENCHMARK_SHAPES[0]
CASES = (
    Case(MAIN, main=True, peak_memory=True, directions=BOTH),
    *(Case(shape, directions=BOTH) for shape in LINEAR_CROSS_ENTROPY_BENCHMARK_SHAPES[1:]),
    Case(LinearCrossEntropyShape(1000, 10_007, 333, "nothing is a power of two"), directions=BOTH),
    Case(MAIN, kept_memory=True, directions=BOTH),
)
GPU_CASES = (
    Case(
        LinearCrossEntropyShape(16_384, 131_072, 4096, "a large model's head in training"),
        main=True,
        peak_memory=True,
        directions=BOTH,
        dtypes=(torch.bfloat16,),
    ),
)
QUICK_CASES = (Case(LinearCrossEntropyShape(32, 48, 16), main=True, directions=BOTH),)


def bench_linear_cross_entropy(
    case: Case, direction: str, dtype: torch.dtype, backend: str, device: torch.device, compete: Compete
) -> None:
    with device:
        x, weight, _, targets = linear_cross_entropy_inputs(case.shape, dtype)
    compete(
        Contest(
            ours=partial(linear_cross_entropy, backend=backend),
            competitors={EAGER: torchs},
            eager="F.linear, F.cross_entropy",
            inputs=Inputs(
                (x, weight, targets), leaves=(x, weight), gradients=(torch.ones((), device=device),)
            ),
            work=work(case.shape, dtype),
            # torch rounds log softmax to bfloat16 before the loss is taken from it.
            reference=partial(linear_cross_entropy, backend="reference"),
        )
    )


def torchs(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), targets)


def work(shape: LinearCrossEntropyShape, dtype: torch.dtype) -> Work:
    """Three products; x and weight read, their gradients written."""
    elements = 2 * (shape.R + shape.V) * shape.E
    return Work(6 * shape.R * shape.V * shape.E, elements * dtype.itemsize, "matmul")
