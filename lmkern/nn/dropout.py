"""Dropout from few random numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmkern.kernels.philox import LEVELS, keep_scale, threshold


class Dropout(nn.Dropout):
    """As torch.nn.Dropout: in training an element is 0 with probability p, else x / (1 - p).

    Here p is rounded to a multiple of 1 / 65536: on a CPU, where torch draws a number for each element in
    turn, one draw of 64 bits then serves four. It draws from torch's default generator.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(*) -> (*), in x's dtype."""
        if self.inplace:
            return super().forward(x)
        return dropout(x, self.p if self.training else 0.0)


def dropout(x: Tensor, p: float) -> Tensor:
    """x (*) with its elements 0 with probability p, else divided by 1 - p."""
    if p == 0.0:
        return x
    if x.device.type != "cpu" or threshold(p) == LEVELS:
        return F.dropout(x, min(1.0, threshold(p) / LEVELS))
    draws = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 4),), dtype=torch.int64)
    bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
    kept = bits >= threshold(p) - LEVELS // 2
    return x * kept.to(x.dtype).mul_(keep_scale(p))
