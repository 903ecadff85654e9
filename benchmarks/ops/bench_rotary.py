"""Rotary positions against eager torch and torch.compile."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.contest import EAGER, Case, Compete, Contest, Inputs, Work
from lmkern.ops import rotary
from lmkern.testing import seeded_randn

OP = "rotary"


@dataclass(frozen=True)
class Shape:
    """Queries and keys side by side, (B, N, H, D) in memory."""

    B: int
    H: int
    N: int
    D: int

    def __str__(self) -> str:
        return f"B{self.B}-H{self.H}-N{self.N}-D{self.D}"


CASES = (
    Case(Shape(4, 24, 1024, 64), main=True, kept_memory=True),
    Case(Shape(16, 16, 1024, 64)),
    Case(Shape(2, 20, 1000, 128)),
)
GPU_CASES = (Case(Shape(2, 64, 8192, 128), main=True, dtypes=(torch.bfloat16,)),)
QUICK_CASES = (Case(Shape(2, 3, 16, 8), main=True),)


def bench_rotary(
    case: Case, direction: str, dtype: torch.dtype, backend: str, device: torch.device, compete: Compete
) -> None:
    shape: Shape = case.shape
    randn = seeded_randn(0, dtype, str(device))
    x, dy = (randn(shape.B, shape.N, shape.H, shape.D).transpose(1, 2) for _ in range(2))
    angles = torch.outer(torch.arange(shape.N), 10000.0 ** -torch.arange(0, 1, 2 / shape.D)).to(device)
    compete(
        Contest(
            ours=partial(rotary, backend=backend),
            competitors={EAGER: torchs},
            eager="x * cos + rotate_half(x) * sin",
            inputs=Inputs((x, angles.cos(), angles.sin()), leaves=(x,), gradients=(dy,)),
            work=work(shape, direction, dtype),
            # torch rounds cos, sin and both products to x's dtype.
            reference=partial(rotary, backend="reference"),
        )
    )


def torchs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = (torch.cat((table, table), dim=-1).to(x.dtype) for table in (cos, sin))
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


def work(shape: Shape, direction: str, dtype: torch.dtype) -> Work:
    """3 operations an element, read once and written once."""
    elements = shape.B * shape.H * shape.N * shape.D * (2 if direction == "both" else 1)
    return Work(3 * elements, 2 * elements * dtype.itemsize, "copy")
