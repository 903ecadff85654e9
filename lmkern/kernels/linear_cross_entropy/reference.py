"""Linear + cross-entropy in eager torch: the specification that every other backend is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from lmkern.kernels.backends import Call
from lmkern.kernels.cross_entropy import reference as cross_entropy


def unavailable() -> str | None:
    return None


def unsupported(call: Call) -> str | None:
    return None


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dloss: Tensor,
    *,
    needs: tuple[bool, bool, bool],
    **options: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    x_wide, weight_wide = _wide(x), _wide(weight)
    logits = x_wide @ weight_wide.T  # (R, V)
    if bias is not None:
        logits = logits + bias
    loss, *statistics = cross_entropy.forward(logits, targets, **options)  # type: ignore[arg-type]
    dx = dweight = dbias = None
    if any(needs):
        dlogits = cross_entropy.backward(dloss, logits, targets, *statistics, **options)  # type: ignore[arg-type]
        dx = (dlogits @ weight_wide).to(x.dtype) if needs[0] else None  # (R, E)
        dweight = (dlogits.T @ x_wide).to(weight.dtype) if needs[1] else None  # (V, E)
        dbias = dlogits.sum(0).to(x.dtype) if needs[2] else None  # (V,)
    return loss, dx, dweight, dbias


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
