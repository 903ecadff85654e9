"""Linear in eager torch: the specification that every other backend is compared with."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lmkern.kernels.backends import Call


def unavailable() -> str | None:
    return None


def unsupported(call: Call) -> str | None:
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)
