"""Layer norm with weight and bias against eager torch and torch.compile."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.contest import EAGER, Case, Compete, Contest, Inputs, Work
from lmkern.ops import layer_norm
from lmkern.testing import (
    LAYER_NORM_BENCHMARK_SHAPES,
    NORM_GPU_SHAPES,
    LayerNormShape,
    layer_norm_inputs,
)

OP = "layer_norm"
MAIN = LayerNormShape(4096, 768)
CASES = (
    *(Case(shape, main=str(shape) == str(MAIN)) for shape in LAYER_NORM_BENCHMARK_SHAPES),
    Case(LayerNormShape(16384, 1024, "far larger than every cache")),
    Case(LayerNormShape(16384, 1024), kept_memory=True),
    Case(LayerNormShape(1000, 333, "nothing is a power of two")),
)
GPU_CASES = tuple(
    Case(shape, main=shape == NORM_GPU_SHAPES[0], dtypes=(torch.bfloat16,)) for shape in NORM_GPU_SHAPES
)
QUICK_CASES = (
    Case(LayerNormShape(32, 48), main=True, peak_memory=True),
    Case(LayerNormShape(32, 48), kept_memory=True, directions=("both",)),
)


def bench_layer_norm(
    case: Case, direction: str, dtype: torch.dtype, backend: str, device: torch.device, compete: Compete
) -> None:
    x, weight, bias, dy = layer_norm_inputs(case.shape, dtype, device=str(device))
    compete(
        Contest(
            ours=partial(layer_norm, backend=backend),
            competitors={EAGER: F.layer_norm},
            eager="F.layer_norm",
            inputs=Inputs((x, weight.shape, weight, bias), leaves=(x, weight, bias), gradients=(dy,)),
            work=work(case.shape, direction, dtype),
            # torch sums the gradients of bfloat16 weights in bfloat16: 5% off at 4,096 rows.
            reference=partial(layer_norm, backend="reference"),
        )
    )


def work(shape: LayerNormShape, direction: str, dtype: torch.dtype) -> Work:
    """Per element: forward 7 operations, x read and y written; backward 13, x, dy read and dx written."""
    operations, tensors, parameters = {"forward": (7, 2, 2), "backward": (13, 3, 3), "both": (20, 5, 5)}[
        direction
    ]
    elements = shape.R * shape.E
    size = (tensors * elements + parameters * shape.E) * dtype.itemsize + 8 * shape.R
    return Work(operations * elements, size, "copy")
