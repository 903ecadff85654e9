"""RMS norm on GPUs through Triton: lmkern/kernels/norm_triton.py."""

from __future__ import annotations

from torch import Tensor

from lmkern.kernels import norm_triton
from lmkern.kernels.norm_triton import NOTE, unavailable, unsupported

__all__ = ["NOTE", "backward", "forward", "unavailable", "unsupported"]


def forward(x: Tensor, weight: Tensor | None, *, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    y, _, _, rstd = norm_triton.forward(x, None, weight, None, eps=eps, centred=False, offset=offset)
    return y, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    *,
    offset: float,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    dx, _, dweight, _ = norm_triton.backward(
        dy, None, x, weight, None, rstd, needs=(needs[0], False, needs[1], False), offset=offset
    )
    return dx, dweight
