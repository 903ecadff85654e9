"""Casts and transposing copies against torch's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.contest import EAGER, Case, Compete, Contest, Inputs, Work
from lmkern.ops import cast, transposed_copy
from lmkern.testing import seeded_randn

OP = "copy"


@dataclass(frozen=True)
class Shape:
    """x (R, C) of the row's dtype, into `to`; transposed or not."""

    R: int
    C: int
    to: torch.dtype
    transposed: bool

    def __str__(self) -> str:
        verb = "transposed" if self.transposed else "cast"
        return f"{verb}-R{self.R}-C{self.C}-to-{str(self.to).removeprefix('torch.')}"


def cases(R: int, C: int, *, main: bool = False) -> tuple[Case, ...]:
    bf16, f32 = (torch.bfloat16,), (torch.float32,)
    rows = (
        (Shape(R, C, torch.bfloat16, True), bf16),
        (Shape(R, C, torch.float32, True), f32),
        (Shape(R, C, torch.bfloat16, True), f32),
        (Shape(R, C, torch.bfloat16, False), f32),
        (Shape(R, C, torch.float32, False), bf16),
    )
    return tuple(
        Case(shape, dtypes=dtypes, directions=("forward",), main=main and row == 0)
        for row, (shape, dtypes) in enumerate(rows)
    )


CASES = (*cases(4096, 768, main=True), *cases(4096, 3072), *cases(1000, 333))
GPU_CASES = cases(16_384, 8192, main=True)
QUICK_CASES = cases(32, 48, main=True)


def bench_copy(
    case: Case, direction: str, dtype: torch.dtype, backend: str, device: torch.device, compete: Compete
) -> None:
    shape: Shape = case.shape
    x = seeded_randn(0, dtype, str(device))(shape.R, shape.C)
    ours = transposed_copy if shape.transposed else cast
    compete(
        Contest(
            ours=partial(ours, dtype=shape.to, backend=backend),
            competitors={EAGER: partial(torchs, shape=shape)},
            eager="x.t().contiguous().to(dtype)" if shape.transposed else "x.to(dtype)",
            inputs=Inputs((x,)),
            work=Work(0, x.numel() * (dtype.itemsize + shape.to.itemsize), "copy"),
        )
    )


def torchs(x: Tensor, *, shape: Shape) -> Tensor:
    return (x.t().contiguous() if shape.transposed else x).to(shape.to)
