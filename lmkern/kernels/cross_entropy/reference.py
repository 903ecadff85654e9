"""Cross-entropy in eager torch: the specification that every other backend is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from lmkern.kernels.anywhere import unavailable, unsupported
from lmkern.kernels.statistics import wide

__all__ = ["backward", "forward", "unavailable", "unsupported"]


def forward(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    ignored = targets == ignore_index  # (R,)
    z = _capped(wide(logits), softcap)  # (R, V)
    row_max = z.amax(1) if z.shape[1] else z.new_zeros(z.shape[0])  # (R,)
    log_sum = (z - row_max[:, None]).exp().sum(1).log()  # (R,)
    hit = z.gather(1, targets.where(~ignored, 0)[:, None])[:, 0] if z.shape[1] else row_max  # (R,)
    loss = (1 - label_smoothing) * (row_max - hit + log_sum)
    if label_smoothing:
        loss = loss + label_smoothing * (log_sum - (z - row_max[:, None]).mean(1))
    if z_loss:
        loss = loss + z_loss * (row_max + log_sum).square()
    statistics = (loss, row_max, log_sum)
    return tuple(statistic.masked_fill(ignored, 0) for statistic in statistics)  # type: ignore[return-value]


def backward(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    ignored = targets == ignore_index  # (R,)
    logits_wide = wide(logits)
    z = _capped(logits_wide, softcap)  # (R, V)
    dz = (z - row_max[:, None] - log_sum[:, None]).exp()  # (R, V)
    if z_loss:
        dz = dz * (1 + 2 * z_loss * (row_max + log_sum))[:, None]
    if z.shape[1]:
        dz = dz - label_smoothing / z.shape[1]
        hit = targets.where(~ignored, 0)[:, None]
        dz = dz.scatter_add(1, hit, torch.full_like(hit, label_smoothing - 1, dtype=dz.dtype))
    dz = dz * dloss[:, None]
    if softcap:
        dz = dz * (1 - (logits_wide / softcap).tanh().square())
    return dz.masked_fill(ignored[:, None], 0).to(logits.dtype)


def _capped(logits: Tensor, softcap: float) -> Tensor:
    return (logits / softcap).tanh() * softcap if softcap else logits
