"""Dropout, residual and norm on the CPU: csrc/norm/cpu_*.cpp."""

from __future__ import annotations

from torch import Tensor

from lmkern.kernels import norm_call
from lmkern.kernels.add_norm.options import Options
from lmkern.kernels.cpu_call import unavailable, unsupported
from lmkern.kernels.norm_call import CPU, Engine

__all__ = ["backward", "forward", "unavailable", "unsupported"]


def forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: Options,
    *,
    engine: Engine = CPU,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    y, h, mean, rstd = norm_call.forward(
        x,
        residual,
        weight,
        bias,
        eps=options.eps,
        centred=options.centred,
        offset=options.offset,
        dropout_p=options.dropout_p,
        seed=options.seed,
        engine=engine,
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
    engine: Engine = CPU,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    # Without dropout, and in one dtype, the two gradients are the same numbers.
    same = options.dropout_p == 0.0 and dy.dtype == h.dtype
    wanted = (needs[0] and not same, needs[1] or (needs[0] and same), *needs[2:])
    dx, dresidual, dweight, dbias = norm_call.backward(
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
        engine=engine,
    )
    if same:
        dx, dresidual = dresidual if needs[0] else None, dresidual if needs[1] else None
    return dx, dresidual, dweight, dbias
