"""Layer norm in eager torch: the specification that every other backend is compared with."""

from __future__ import annotations

from torch import Tensor

from lmkern.kernels.anywhere import unavailable, unsupported
from lmkern.kernels.statistics import wide

__all__ = ["backward", "forward", "unavailable", "unsupported"]


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x_wide = wide(x)
    mean = x_wide.mean(-1)  # (R,)
    centred = x_wide - mean[:, None]  # (R, E)
    rstd = (centred.square().mean(-1) + eps).rsqrt()  # (R,)
    y = centred * rstd[:, None]  # (R, E)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype), mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dy_wide = wide(dy)
    x_hat = (wide(x) - mean[:, None]) * rstd[:, None]  # (R, E)
    dx = dweight = dbias = None
    if needs[0]:
        dx_hat = dy_wide if weight is None else dy_wide * weight  # (R, E)
        along = (dx_hat * x_hat).mean(-1, keepdim=True)  # (R, 1)
        dx = ((dx_hat - dx_hat.mean(-1, keepdim=True) - x_hat * along) * rstd[:, None]).to(x.dtype)
    if needs[1]:
        dweight = (dy_wide * x_hat).sum(0)  # (E,)
    if needs[2]:
        dbias = dy_wide.sum(0)  # (E,)
    return dx, dweight, dbias
