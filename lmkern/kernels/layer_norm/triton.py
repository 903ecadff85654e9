"""Layer norm on GPUs through Triton: lmkern/kernels/norm_triton.py."""

from __future__ import annotations

from torch import Tensor

from lmkern.kernels import norm_triton
from lmkern.kernels.norm_triton import NOTE, unavailable, unsupported

__all__ = ["NOTE", "backward", "forward", "unavailable", "unsupported"]


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = norm_triton.forward(x, None, weight, bias, eps=eps, centred=True)
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dx, _, dweight, dbias = norm_triton.backward(
        dy, None, x, weight, mean, rstd, needs=(needs[0], False, needs[1], needs[2])
    )
    return dx, dweight, dbias
