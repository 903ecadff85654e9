"""Embedding against eager torch and torch.compile."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.contest import EAGER, Case, Compete, Contest, Inputs, Work
from lmkern.ops import embedding
from lmkern.testing import seeded_randn

OP = "embedding"


@dataclass(frozen=True)
class Shape:
    """N tokens, drawn so that token v is as frequent as 1 / (v + 1), out of V; rows of E."""

    N: int
    V: int
    E: int

    def __str__(self) -> str:
        return f"N{self.N}-V{self.V}-E{self.E}"


CASES = (
    Case(Shape(4096, 50_304, 768), main=True, kept_memory=True),
    Case(Shape(16_384, 50_304, 1024)),
    Case(Shape(8192, 65, 384)),
)
GPU_CASES = (Case(Shape(65_536, 131_072, 4096), main=True, dtypes=(torch.bfloat16,)),)
QUICK_CASES = (Case(Shape(32, 48, 16), main=True),)


def bench_embedding(
    case: Case, direction: str, dtype: torch.dtype, backend: str, device: torch.device, compete: Compete
) -> None:
    shape: Shape = case.shape
    randn = seeded_randn(0, dtype, str(device))
    weight, dy = randn(shape.V, shape.E), randn(shape.N, shape.E)
    frequencies = 1 / torch.arange(1, shape.V + 1)
    tokens = torch.multinomial(
        frequencies, shape.N, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    compete(
        Contest(
            ours=partial(embedding, backend=backend),
            competitors={EAGER: torchs},
            eager="F.embedding",
            inputs=Inputs((tokens.to(device), weight), leaves=(weight,), gradients=(dy,)),
            work=work(shape, direction, dtype),
            # torch sums the gradients of a bfloat16 weight in bfloat16.
            reference=partial(embedding, backend="reference"),
        )
    )


def torchs(tokens: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.embedding(tokens, weight)


def work(shape: Shape, direction: str, dtype: torch.dtype) -> Work:
    """Forward reads and writes a row for each token; backward reads it and writes the whole gradient."""
    rows = {"forward": 2 * shape.N, "backward": shape.N + shape.V, "both": 3 * shape.N + shape.V}[direction]
    return Work(0 if direction == "forward" else shape.N * shape.E, rows * shape.E * dtype.itemsize, "copy")
