"""Dropout from few random numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """As torch.nn.Dropout: in training an element is 0 with probability p, else x / (1 - p).

    p is rounded to a multiple of 1 / 65536: on a CPU, where torch draws a number for each element in turn,
    one draw of 64 bits then serves four. It draws from torch's default generator.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(*) -> (*), in x's dtype."""
        if not self.training or self.p == 0.0:
            return x
        if x.device.type != "cpu" or self.p == 1.0 or self.inplace:
            return super().forward(x)
        draws = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 4),), dtype=torch.int64)
        bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
        kept = bits >= round(self.p * 65536) - 32768
        return x * kept.to(x.dtype).mul_(1 / (1 - self.p))
