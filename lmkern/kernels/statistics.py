"""In what dtype kernels keep sums and statistics."""

from __future__ import annotations

import torch
from torch import Tensor


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what dtype a sum over all tokens is handed on before the loss's own scale is applied to it: float32
    for float16, whose largest number it may pass."""
    return torch.float32 if dtype == torch.float16 else dtype


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums and statistics over x: float32, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """x in the dtype of its statistics."""
    return x.to(statistics_dtype(x))
