"""Products of 16-bit factors in float32, for a processor on which torch has no fast product of them.

A weight is widened some rows at a time, so that it is never held twice. Autocast, which would narrow the
factors again, is off.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lmkern.kernels.autocast import outside_autocast

# Rows of the weight, or of its gradient, that a product takes at once.
_ROWS = 4096


@outside_autocast
def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Writes y (R, N) = x (R, K) @ weight^T (K, N) + bias."""
    wide = x.float()
    for rows in _parts(weight.shape[0]):
        part = wide @ weight[rows].float().T
        y[:, rows] = part if bias is None else part.add_(bias[rows])


@outside_autocast
def input_gradient(dy: Tensor, weight: Tensor, dx: Tensor) -> None:
    """Writes dx (R, K) = dy (R, N) @ weight (N, K)."""
    sums = dx.new_zeros(dx.shape, dtype=torch.float32)
    for rows in _parts(weight.shape[0]):
        sums.addmm_(dy[:, rows].float(), weight[rows].float())
    dx.copy_(sums)


@outside_autocast
def add_weight_gradient(dy: Tensor, x: Tensor, sums: Tensor) -> None:
    """Adds dy^T (N, R) @ x (R, K) to sums (N, K), which are float32."""
    wide = x.float()
    for rows in _parts(sums.shape[0]):
        sums[rows].addmm_(dy[:, rows].float().T, wide)


def _parts(rows: int) -> Iterator[slice]:
    return (slice(first, first + _ROWS) for first in range(0, rows, _ROWS))
