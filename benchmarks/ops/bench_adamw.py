"""A step of AdamW against torch's fused one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.contest import EAGER, Case, Compete, Contest, Inputs, Work
from lmkern.ops import adamw_
from lmkern.testing import seeded_randn

OP = "adamw"
OPTIONS = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.1}


@dataclass(frozen=True)
class Shape:
    """A parameter (R, C); with a bfloat16 copy or not."""

    R: int
    C: int
    copy: bool = False

    def __str__(self) -> str:
        return f"R{self.R}-C{self.C}" + ("-copy" if self.copy else "")


def case(shape: Shape, *, main: bool = False) -> Case:
    # torch keeps the moments of bfloat16 parameters in bfloat16: not the same work.
    return Case(shape, main=main, directions=("forward",), dtypes=(torch.float32,))


CASES = (
    case(Shape(768, 3072), main=True),
    case(Shape(768, 3072, copy=True)),
    case(Shape(50_304, 768)),
    case(Shape(50_304, 768, copy=True)),
)
GPU_CASES = (case(Shape(131_072, 1024), main=True), case(Shape(131_072, 1024, copy=True)))
QUICK_CASES = (case(Shape(32, 48), main=True), case(Shape(32, 48, copy=True)))

Step = Callable[[Tensor, Tensor], Tensor]


def bench_adamw(
    case: Case, direction: str, dtype: torch.dtype, backend: str, device: torch.device, compete: Compete
) -> None:
    shape: Shape = case.shape
    randn = seeded_randn(0, dtype, str(device))
    elements = shape.R * shape.C
    compete(
        Contest(
            ours=ours(shape, backend),
            competitors={EAGER: torchs(shape)},
            eager="torch.optim.AdamW(fused=True)" + (", then copy_ into bfloat16" if shape.copy else ""),
            inputs=Inputs((randn(shape.R, shape.C), randn(shape.R, shape.C))),
            work=Work(14 * elements, (30 if shape.copy else 28) * elements, "copy"),
            compiles=False,
        )
    )


def ours(shape: Shape, backend: str) -> Step:
    """Each call is the next step of one run that begins at the first call's parameter."""
    state: list[Tensor] = []
    steps = 0

    def step(param: Tensor, grad: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        if not state:
            state.extend((param.clone(), torch.zeros_like(param), torch.zeros_like(param)))
            state.append(torch.empty_like(param, dtype=torch.bfloat16))
        mine, exp_avg, exp_avg_sq, copy = state
        adamw_(
            mine,
            grad,
            exp_avg,
            exp_avg_sq,
            beta1=0.9,
            beta2=0.95,
            step=steps,
            copy=copy if shape.copy else None,
            backend=backend,
            **OPTIONS,
        )
        return mine

    return step


def torchs(shape: Shape) -> Step:
    state: list[Tensor] = []
    optimizers: list[torch.optim.Optimizer] = []

    def step(param: Tensor, grad: Tensor) -> Tensor:
        if not state:
            leaf = torch.nn.Parameter(param.clone())
            leaf.grad = grad
            state.extend((leaf, torch.empty_like(param, dtype=torch.bfloat16)))
            optimizers.append(torch.optim.AdamW([leaf], betas=(0.9, 0.95), fused=True, **OPTIONS))
        optimizers[0].step()
        if shape.copy:
            state[1].copy_(state[0].detach())
        return state[0].detach()

    return step
