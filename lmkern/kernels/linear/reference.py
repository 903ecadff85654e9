"""Linear in eager torch: the specification that every other backend is compared with."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lmkern.kernels.anywhere import unavailable, unsupported

__all__ = ["forward", "unavailable", "unsupported"]


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)
