"""Linear + cross-entropy in eager torch: the specification that every other backend is compared with."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lmkern.kernels.anywhere import unavailable, unsupported
from lmkern.kernels.autocast import outside_autocast
from lmkern.kernels.cross_entropy import reference as cross_entropy
from lmkern.kernels.statistics import gradient_dtype

__all__ = ["backward", "forward", "unavailable", "unsupported"]


@outside_autocast
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
    logits = F.linear(x, weight, bias)  # (R, V)
    loss, *statistics = cross_entropy.forward(logits, targets, **options)
    dx = dweight = dbias = None
    if any(needs):
        dlogits = cross_entropy.backward(dloss, logits, targets, *statistics, **options)
        dx = dlogits @ weight if needs[0] else None  # (R, E)
        sums = gradient_dtype(x.dtype)
        dweight = dlogits.T.to(sums) @ x.to(sums) if needs[1] else None  # (V, E)
        dbias = dlogits.sum(0, dtype=sums) if needs[2] else None  # (V,)
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
