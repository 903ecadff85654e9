"""In what dtype kernels keep sums and statistics."""

from __future__ import annotations

import torch
from torch import Tensor


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums and statistics over x: float32, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
