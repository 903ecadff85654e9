"""Linear of few rows against eager torch and torch.compile."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.contest import EAGER, Case, Compete, Contest, Inputs, Work
from lmkern.ops import linear
from lmkern.testing import seeded_randn

OP = "linear"


@dataclass(frozen=True)
class Shape:
    """x (R, K), weight (N, K)."""

    R: int
    N: int
    K: int

    def __str__(self) -> str:
        return f"R{self.R}-N{self.N}-K{self.K}"


def case(R: int, N: int, K: int, main: bool = False) -> Case:
    return Case(Shape(R, N, K), main=main, directions=("forward",))


CASES = (
    case(1, 50_304, 768, main=True),
    case(4, 50_304, 768),
    case(1, 3072, 768),
    case(4, 1536, 384),
)
GPU_CASES: tuple[Case, ...] = ()
QUICK_CASES = (case(2, 48, 16, main=True),)


def bench_linear(
    case: Case, direction: str, dtype: torch.dtype, backend: str, device: torch.device, compete: Compete
) -> None:
    shape: Shape = case.shape
    randn = seeded_randn(0, dtype, str(device))
    x, weight = randn(shape.R, shape.K), randn(shape.N, shape.K)
    compete(
        Contest(
            ours=partial(linear, backend=backend),
            competitors={EAGER: torchs},
            eager="F.linear",
            inputs=Inputs((x, weight)),
            work=work(shape, dtype),
        )
    )


def torchs(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)


def work(shape: Shape, dtype: torch.dtype) -> Work:
    """The weight is read once."""
    elements = shape.N * shape.K + shape.R * (shape.N + shape.K)
    return Work(2 * shape.R * shape.N * shape.K, elements * dtype.itemsize, "copy")
