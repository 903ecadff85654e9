"""What else a call of add_norm says."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Options:
    """centred: layer norm; otherwise RMS norm."""

    centred: bool
    eps: float
    offset: float = 0.0
    dropout_p: float = 0.0
    seed: Tensor | None = None  # () int64; with dropout_p > 0
