"""What the losses share: checks of targets and options, and the reduction over tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmkern.kernels.checked import checked
from lmkern.ops.dispatch import checked_softcap

REDUCTIONS = ("mean", "sum", "none")

# Losses added up in a row by torch, which shares a sum of more elements out among its threads: its rounding
# would depend on their number.
_SUMMED_BY_ONE_THREAD = 16_384


def reduce(loss: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """loss (R,) as it is, its sum, or its mean over the targets that are not ignored: NaN without one."""
    if reduction == "none":
        return loss
    total = sum_of(loss)
    return total if reduction == "sum" else total / (targets != ignore_index).sum()


def sum_of(loss: Tensor) -> Tensor:
    """The sum of loss (R,), the same bits for every number of threads."""
    while loss.shape[0] > _SUMMED_BY_ONE_THREAD:
        parts = F.pad(loss, (0, -loss.shape[0] % _SUMMED_BY_ONE_THREAD))
        loss = parts.view(-1, _SUMMED_BY_ONE_THREAD).sum(1)
    return loss.sum()


def check_options(
    name: str, label_smoothing: float, z_loss: float, softcap: float | None, reduction: str
) -> None:
    """ValueError in words for an option out of its range."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: label_smoothing must lie in [0, 1]; got {label_smoothing}")
    if not 0.0 <= z_loss < float("inf"):
        raise ValueError(f"{name}: z_loss must be a finite number from 0 up; got {z_loss}")
    checked_softcap(name, softcap)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")


def check_targets(name: str, rows: str, targets: Tensor, expected: torch.Size, device: torch.device) -> None:
    """ValueError in words unless targets are int64 of the shape of the rows they belong to."""
    if targets.dtype != torch.int64 or targets.shape != expected:
        raise ValueError(
            f"{name}: targets must be int64, one for each row of {rows}, {tuple(expected)}; "
            f"got {targets.dtype} {tuple(targets.shape)}"
        )
    if targets.device != device:
        raise ValueError(f"{name}: targets must be on the device of {rows}, {device}; got {targets.device}")


def check_range(name: str, targets: Tensor, V: int, ignore_index: int) -> None:
    """IndexError for a target that is no class, where that is looked at (lmkern.kernels.checked)."""
    if not targets.numel() or not checked(targets):
        return
    low, high = targets.aminmax()
    if low >= 0 and high < V:
        return
    outside = targets[((targets < 0) | (targets >= V)) & (targets != ignore_index)]
    if outside.numel():
        raise IndexError(
            f"{name}: targets must lie in [0, {V}) or be ignore_index {ignore_index}; got {int(outside[0])}"
        )
