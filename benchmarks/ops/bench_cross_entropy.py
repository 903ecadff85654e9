"""Cross-entropy of logits that are there already, against eager torch and torch.compile."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.contest import EAGER, Case, Compete, Contest, Inputs, Work
from lmkern.ops import cross_entropy
from lmkern.testing import CROSS_ENTROPY_BENCHMARK_SHAPES, CrossEntropyShape, cross_entropy_inputs

OP = "cross_entropy"
CASES = (
    *(Case(shape, main=shape.V == 50_304) for shape in CROSS_ENTROPY_BENCHMARK_SHAPES),
    Case(CrossEntropyShape(1000, 10_007, "nothing is a power of two")),
    Case(CROSS_ENTROPY_BENCHMARK_SHAPES[0], kept_memory=True),
)
GPU_CASES = (
    Case(
        CrossEntropyShape(16_384, 131_072, "a large model's logits in training"),
        main=True,
        dtypes=(torch.bfloat16,),
    ),
    Case(CrossEntropyShape(32_768, 4096, "rows that registers hold"), dtypes=(torch.bfloat16,)),
)
QUICK_CASES = (Case(CrossEntropyShape(32, 48), main=True),)


def bench_cross_entropy(
    case: Case, direction: str, dtype: torch.dtype, backend: str, device: torch.device, compete: Compete
) -> None:
    with device:
        logits, targets, _ = cross_entropy_inputs(case.shape, dtype)
    dloss = torch.ones((), device=device)
    compete(
        Contest(
            ours=partial(cross_entropy, backend=backend),
            competitors={EAGER: F.cross_entropy},
            eager="F.cross_entropy",
            inputs=Inputs((logits, targets), leaves=(logits,), gradients=(dloss,)),
            work=work(case.shape, direction, dtype),
            # torch rounds log softmax to bfloat16 before the loss is taken from it.
            reference=partial(cross_entropy, backend="reference"),
        )
    )


def work(shape: CrossEntropyShape, direction: str, dtype: torch.dtype) -> Work:
    """Per logit: forward 4 operations (exp is one) and a read; backward 4, a read and a write."""
    operations, tensors = {"forward": (4, 1), "backward": (4, 2), "both": (8, 3)}[direction]
    elements = shape.R * shape.V
    return Work(operations * elements, tensors * elements * dtype.itemsize, "copy")
