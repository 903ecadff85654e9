"""RMS norm with weight against eager torch and torch.compile."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.contest import EAGER, Case, Compete, Contest, Inputs, Work
from lmkern.ops import rms_norm
from lmkern.testing import NORM_GPU_SHAPES, LayerNormShape, layer_norm_inputs

OP = "rms_norm"
CASES = (Case(LayerNormShape(4096, 768), main=True), Case(LayerNormShape(16384, 1024), kept_memory=True))
GPU_CASES = tuple(
    Case(shape, main=shape == NORM_GPU_SHAPES[0], dtypes=(torch.bfloat16,)) for shape in NORM_GPU_SHAPES
)
QUICK_CASES = (Case(LayerNormShape(32, 48), main=True),)

EPS = 1e-6


def bench_rms_norm(
    case: Case, direction: str, dtype: torch.dtype, backend: str, device: torch.device, compete: Compete
) -> None:
    x, weight, _, dy = layer_norm_inputs(case.shape, dtype, device=str(device))
    compete(
        Contest(
            ours=partial(rms_norm, backend=backend),
            competitors={EAGER: F.rms_norm},
            eager="F.rms_norm",
            inputs=Inputs((x, weight.shape, weight, EPS), leaves=(x, weight), gradients=(dy,)),
            work=work(case.shape, direction, dtype),
            # torch sums the gradient of a bfloat16 weight in bfloat16.
            reference=partial(rms_norm, backend="reference"),
        )
    )


def work(shape: LayerNormShape, direction: str, dtype: torch.dtype) -> Work:
    """Per element: forward 4 operations, x read and y written; backward 9, x, dy read and dx written."""
    operations, tensors = {"forward": (4, 2), "backward": (9, 3), "both": (13, 5)}[direction]
    elements = shape.R * shape.E
    return Work(operations * elements, tensors * elements * dtype.itemsize + 4 * shape.R, "copy")
