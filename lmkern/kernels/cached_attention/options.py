"""What a call of cached attention says beside its tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class Options:
    """What else a call says. Tensors lie on q's device. Never changed, as attention's.

    softcap(s) = softcap * tanh(s / softcap), nothing if it is 0.

    With a page table key j of sequence b is row j % page_size of page page_table[b, j // page_size].
    """

    softmax_scale: float
    lengths: Tensor | None = None  # (B,) int32, contiguous, in [0, N_max]; None: N_max each
    page_table: Tensor | None = None  # (B, max_pages) int32, a row contiguous; N_max = max_pages * page_size
    left: int | None = None
    softcap: float = 0.0
    sinks: Tensor | None = (
        None  # (H,) float32 (float64 for float64): a score whose value is zero; part of lse
    )
    alibi_slopes: Tensor | None = None  # (H,) float32 (float64)
