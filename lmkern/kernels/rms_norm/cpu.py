"""RMS norm on the CPU: csrc/norm/cpu_*.cpp."""

from __future__ import annotations

from torch import Tensor

from lmkern.kernels import norm_call
from lmkern.kernels.cpu_call import unavailable, unsupported
from lmkern.kernels.norm_call import CPU, Engine

__all__ = ["backward", "forward", "unavailable", "unsupported"]


def forward(
    x: Tensor, weight: Tensor | None, *, eps: float, offset: float, engine: Engine = CPU
) -> tuple[Tensor, Tensor]:
    y, _, _, rstd = norm_call.forward(
        x, None, weight, None, eps=eps, centred=False, offset=offset, engine=engine
    )
    return y, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    *,
    offset: float,
    needs: tuple[bool, bool],
    engine: Engine = CPU,
) -> tuple[Tensor | None, Tensor | None]:
    dx, _, dweight, _ = norm_call.backward(
        dy,
        None,
        x,
        weight,
        None,
        rstd,
        needs=(needs[0], False, needs[1], False),
        offset=offset,
        engine=engine,
    )
    return dx, dweight
