"""Layer norm on the CPU: csrc/norm/cpu_*.cpp."""

from __future__ import annotations

from torch import Tensor

from lmkern.kernels import norm_call
from lmkern.kernels.cpu_call import unavailable, unsupported
from lmkern.kernels.norm_call import CPU, Engine

__all__ = ["backward", "forward", "unavailable", "unsupported"]


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, engine: Engine = CPU
) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = norm_call.forward(x, None, weight, bias, eps=eps, centred=True, engine=engine)
    assert mean is not None
    return y, mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    needs: tuple[bool, bool, bool],
    engine: Engine = CPU,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dx, _, dweight, dbias = norm_call.backward(
        dy, None, x, weight, mean, rstd, needs=(needs[0], False, needs[1], needs[2]), engine=engine
    )
    return dx, dweight, dbias
