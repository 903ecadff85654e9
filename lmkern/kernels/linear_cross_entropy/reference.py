"""Linear + cross-entropy in eager torch: the specification that every other backend is compared with."""

from __future__ import annotations

from typing import Any

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
    **options: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    x_wide, weight_wide = _wide(x), _wide(weight)
    logits = x_wide @ weight_wide.T  # (R, V)
    if bias is not None:
        logits = logits + bias
    loss, *statistics = cross_entropy.forward(logits, targets, **options)
    dx = dweight = dbias = None
    if any(needs):
        dlogits = cross_entropy.backward(dloss, logits, targets, *statistics, **options)
        dx = (dlogits @ weight_wide).to(x.dtype) if needs[0] else None  # (R, E)
        dweight = (dlogits.T @ x_wide).to(weight.dtype) if needs[1] else None  # (V, E)
        dbias = dlogits.sum(0).to(x.dtype) if needs[2] else None  # (V,)
    return loss, dx, dweight, dbias


def backward(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    needs: tuple[bool, bool, bool],
    **options: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return forward(x, weight, bias, targets, dloss, needs=needs, **options)[1:]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
