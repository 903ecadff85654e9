"""Cross-entropy in eager torch: the specification that every other backend is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from lmkern.kernels.backends import Call


def unavailable() -> str | None:
    return None


def unsupported(call: Call) -> str | None:
    return None


def forward(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    ignored = targets == ignore_index  # (R,)
    z = _capped(_wide(logits), softcap)  # (R, V)
    lse = z.logsumexp(1)  # (R,)
    hit = z.gather(1, targets.where(~ignored, 0)[:, None])[:, 0] if z.shape[1] else lse  # (R,)
    loss = (1 - label_smoothing) * (lse - hit)
    if label_smoothing:
        loss = loss + label_smoothing * (lse - z.mean(1))
    if z_loss:
        loss = loss + z_loss * lse.square()
    return loss.masked_fill(ignored, 0), lse.masked_fill(ignored, 0)


def backward(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    ignored = targets == ignore_index  # (R,)
    wide = _wide(logits)
    z = _capped(wide, softcap)  # (R, V)
    dz = (z - lse[:, None]).exp() * (1 + 2 * z_loss * lse[:, None])  # (R, V)
    if z.shape[1]:
        dz = dz - label_smoothing / z.shape[1]
        hit = targets.where(~ignored, 0)[:, None]
        dz = dz.scatter_add(1, hit, torch.full_like(hit, label_smoothing - 1, dtype=dz.dtype))
    dz = dz * dloss[:, None]
    if softcap:
        dz = dz * (1 - (wide / softcap).tanh().square())
    return dz.masked_fill(ignored[:, None], 0).to(logits.dtype)


def _capped(logits: Tensor, softcap: float) -> Tensor:
    return (logits / softcap).tanh() * softcap if softcap else logits


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
