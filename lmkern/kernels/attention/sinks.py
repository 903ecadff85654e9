"""The gradient of attention's sinks, which needs no kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def sink_gradient(dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, sinks: Tensor) -> Tensor:
    """A sink's score has the value zero: its gradient is -weight * delta, summed over the queries."""
    delta = (dout.to(lse.dtype) * out).sum(-1, dtype=torch.float64)  # (B, H, N_q)
    if dlse is not None:
        delta = delta - dlse
    weights = torch.exp(sinks[:, None].double() - lse.masked_fill(lse == -torch.inf, torch.inf))
    return -(weights * delta).sum((0, 2)).to(lse.dtype)
