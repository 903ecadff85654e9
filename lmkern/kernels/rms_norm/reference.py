"""RMS norm in eager torch: the specification that every other backend is compared with."""

from __future__ import annotations

from torch import Tensor

from lmkern.kernels.anywhere import unavailable, unsupported
from lmkern.kernels.statistics import wide

__all__ = ["backward", "forward", "unavailable", "unsupported"]


def forward(x: Tensor, weight: Tensor | None, *, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    x_wide = wide(x)
    rstd = (x_wide.square().mean(-1) + eps).rsqrt()  # (R,)
    y = x_wide * rstd[:, None]  # (R, E)
    if weight is not None:
        y = y * (offset + wide(weight))
    return y.to(x.dtype), rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    *,
    offset: float,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    dy_wide = wide(dy)
    x_hat = wide(x) * rstd[:, None]  # (R, E)
    dx = dweight = None
    if needs[0]:
        dx_hat = dy_wide if weight is None else dy_wide * (offset + wide(weight))  # (R, E)
        along = (dx_hat * x_hat).mean(-1, keepdim=True)  # (R, 1)
        dx = ((dx_hat - x_hat * along) * rstd[:, None]).to(x.dtype)
    if needs[1]:
        dweight = (dy_wide * x_hat).sum(0)  # (E,)
    return dx, dweight
