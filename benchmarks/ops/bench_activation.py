"""Activations with their bias against eager torch and torch.compile."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contest import EAGER, Case, Compete, Contest, Inputs, Work
from lmkern.ops import activation
from lmkern.testing import seeded_randn

OP = "activation"


@dataclass(frozen=True)
class Shape:
    """y (R, F); x and bias twice as wide where the function gates."""

    function: str
    R: int
    F: int
    gated: bool = False

    def __str__(self) -> str:
        return f"{self.function}{'-gated' if self.gated else ''}-R{self.R}-F{self.F}"

    @property
    def width(self) -> int:
        return 2 * self.F if self.gated else self.F


CASES = (
    Case(Shape("gelu", 4096, 3072), main=True, kept_memory=True),
    Case(Shape("gelu_tanh", 4096, 3072), kept_memory=True),
    Case(Shape("silu", 4096, 3072, gated=True), kept_memory=True),
    Case(Shape("gelu", 16384, 1024)),
    Case(Shape("silu", 1000, 333, gated=True)),
)
GPU_CASES = (
    Case(Shape("silu", 16_384, 14_336, gated=True), main=True, dtypes=(torch.bfloat16,)),
    Case(Shape("gelu", 16_384, 16_384), dtypes=(torch.bfloat16,)),
)
QUICK_CASES = (Case(Shape("gelu", 32, 48), main=True), Case(Shape("silu", 32, 48, gated=True)))


def bench_activation(
    case: Case, direction: str, dtype: torch.dtype, backend: str, device: torch.device, compete: Compete
) -> None:
    shape: Shape = case.shape
    randn = seeded_randn(0, dtype, str(device))
    x, bias, dy = randn(shape.R, shape.width), randn(shape.width), randn(shape.R, shape.F)
    compete(
        Contest(
            ours=partial(activation, function=shape.function, gated=shape.gated, backend=backend),
            competitors={EAGER: partial(torchs, shape=shape)},
            eager="x + bias, then F." + shape.function.split("_")[0],
            inputs=Inputs((x, bias), leaves=(x, bias), gradients=(dy,)),
            work=work(shape, direction, dtype),
            # torch rounds x + bias, and sums the gradients of a bfloat16 bias in bfloat16.
            reference=partial(activation, function=shape.function, gated=shape.gated, backend="reference"),
        )
    )


def torchs(x: Tensor, bias: Tensor, *, shape: Shape) -> Tensor:
    function = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "silu": F.silu}[
        shape.function
    ]
    if not shape.gated:
        return function(x + bias)
    gate, value = (x + bias).chunk(2, dim=-1)
    return function(gate) * value


def work(shape: Shape, direction: str, dtype: torch.dtype) -> Work:
    """About 20 operations for a function, 25 with its derivative; x, dy read and y, dx written."""
    per_element = {"forward": 20, "backward": 25, "both": 45}[direction]
    wide = {"forward": 1, "backward": 2, "both": 3}[direction]  # tensors of x's width
    narrow = {"forward": 1, "backward": 1, "both": 2}[direction]  # and of y's
    size = shape.R * (wide * shape.width + narrow * shape.F) * dtype.itemsize
    return Work(per_element * shape.R * shape.F, size, "copy")
