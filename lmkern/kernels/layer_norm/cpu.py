"""Layer norm on the CPU: csrc/norm/cpu_*.cpp.

family: what else has `forward` and `backward` of lmkern/kernels/norm_call.py, for other backends of the op.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from lmkern.kernels import norm_call
from lmkern.kernels.cpu_call import unavailable, unsupported

__all__ = ["backward", "forward", "unavailable", "unsupported"]


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, family: ModuleType = norm_call
) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = family.forward(x, None, weight, bias, eps=eps, centred=True)
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
    family: ModuleType = norm_call,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dx, _, dweight, dbias = family.backward(
        dy, None, x, weight, mean, rstd, needs=(needs[0], False, needs[1], needs[2])
    )
    return dx, dweight, dbias
