"""Dropout, residual and norm on the CPU: csrc/norm/cpu_*.cpp.

family: what else has `forward` and `backward` of lmkern/kernels/norm_call.py, for other backends of the op.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from lmkern.kernels import norm_call
from lmkern.kernels.add_norm.options import Options
from lmkern.kernels.cpu_call import unavailable, unsupported

__all__ = ["backward", "forward", "unavailable", "unsupported"]


def forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: Options,
    *,
    family: ModuleType = norm_call,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    y, h, mean, rstd = family.forward(
        x,
        residual,
        weight,
        bias,
        eps=options.eps,
        centred=options.centred,
        offset=options.offset,
        dropout_p=options.dropout_p,
        seed=options.seed,
    )
    assert h is not None
    return y, h, mean, rstd


def backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    options: Options,
    *,
    needs: tuple[bool, bool, bool, bool],
    family: ModuleType = norm_call,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    # Without dropout, and in one dtype, the two gradients are the same numbers.
    same = options.dropout_p == 0.0 and dy.dtype == h.dtype
    wanted = (needs[0] and not same, needs[1] or (needs[0] and same), *needs[2:])
    dx, dresidual, dweight, dbias = family.backward(
        dy,
        dh,
        h,
        weight,
        mean,
        rstd,
        needs=wanted,
        offset=options.offset,
        dropout_p=options.dropout_p,
        seed=options.seed,
    )
    if same:
        dx, dresidual = dresidual if needs[0] else None, dresidual if needs[1] else None
    return dx, dresidual, dweight, dbias
