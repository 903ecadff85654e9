"""RMS norm on the CPU: csrc/norm/cpu_*.cpp.

family: what else has `forward` and `backward` of lmkern/kernels/norm_call.py, for other backends of the op.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from lmkern.kernels import norm_call
from lmkern.kernels.cpu_call import unavailable, unsupported

__all__ = ["backward", "forward", "unavailable", "unsupported"]


def forward(
    x: Tensor, weight: Tensor | None, *, eps: float, offset: float, family: ModuleType = norm_call
) -> tuple[Tensor, Tensor]:
    y, _, _, rstd = family.forward(x, None, weight, None, eps=eps, centred=False, offset=offset)
    return y, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    *,
    offset: float,
    needs: tuple[bool, bool],
    family: ModuleType = norm_call,
) -> tuple[Tensor | None, Tensor | None]:
    dx, _, dweight, _ = family.backward(
        dy, None, x, weight, None, rstd, needs=(needs[0], False, needs[1], False), offset=offset
    )
    return dx, dweight
