"""Dropout, residual and norm in eager torch: the specification that every other backend is compared with."""

from __future__ import annotations

from torch import Tensor

from lmkern.kernels import philox
from lmkern.kernels.add_norm.options import Options
from lmkern.kernels.anywhere import unavailable, unsupported
from lmkern.kernels.layer_norm import reference as layer_norm
from lmkern.kernels.rms_norm import reference as rms_norm
from lmkern.kernels.statistics import wide

__all__ = ["backward", "forward", "unavailable", "unsupported"]


def forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    h = (wide(residual) + _dropout(wide(x), options)).to(residual.dtype)  # (R, E)
    mean: Tensor | None = None
    if options.centred:
        y, mean, rstd = layer_norm.forward(h, _shifted(weight, options), bias, eps=options.eps)
    else:
        y, rstd = rms_norm.forward(h, weight, eps=options.eps, offset=options.offset)
    return y.to(x.dtype), h, mean, rstd


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    dbias = None
    needs_h = needs[0] or needs[1]
    if mean is not None:
        dh_norm, dweight, dbias = layer_norm.backward(
            dy, wide(h), _shifted(weight, options), mean, rstd, needs=(needs_h, *needs[2:])
        )
    else:
        dh_norm, dweight = rms_norm.backward(
            dy, wide(h), weight, rstd, offset=options.offset, needs=(needs_h, needs[2])
        )
    if dh_norm is None:
        return None, None, dweight, dbias
    if dh is not None:
        dh_norm = dh_norm + wide(dh)
    dx = _dropout(dh_norm, options).to(dy.dtype) if needs[0] else None
    return dx, dh_norm.to(h.dtype) if needs[1] else None, dweight, dbias


def _dropout(x: Tensor, options: Options) -> Tensor:
    if options.dropout_p == 0.0 or options.seed is None:
        return x
    kept = philox.keep_mask(options.seed, options.dropout_p, x.shape)  # (R, E)
    return x * kept * philox.keep_scale(options.dropout_p)


def _shifted(weight: Tensor | None, options: Options) -> Tensor | None:
    return None if weight is None else options.offset + wide(weight)
