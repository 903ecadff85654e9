"""A decoder that has learned from pairs, as beam search sees an encoder-decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Ends:
    """The token before a target, which is the end of the source, and the token after it."""

    start: int
    end: int


class PrefixDecoder(nn.Module):
    """model reads source, end, target, end as one sequence: the source is the prefix of its targets.

    model: a decoder with new_cache(batch) and config.context, its cache with reorder. Sources of one batch
    must have one length (`equal_lengths` says so): ValueError.
    """

    equal_lengths = True

    def __init__(self, model: nn.Module, end: int) -> None:
        super().__init__()
        self.model: Any = model
        self.config = Ends(end, end)

    @property
    def context(self) -> int:
        """The most tokens that a source, its end included, and a target may have together."""
        return int(self.model.config.context)

    def encode(self, source: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """source (B, N_s) int64, its end last: it is read with the first token of the target."""
        if source_mask is not None and not source_mask.all():
            raise ValueError("PrefixDecoder: the sources of a batch must have one length; got padding")
        return source

    def new_cache(self, batch: int, context: int) -> Any:
        """An empty cache; it holds the model's context, whatever is asked for."""
        return self.model.new_cache(batch)

    def decode(
        self, target: Tensor, memory: Tensor, source_mask: Tensor | None = None, *, cache: Any
    ) -> Tensor:
        """target (B * beams, N) int64 -> logits (B * beams, N, V)."""
        if cache.length:
            return self.model(target, cache=cache)  # type: ignore[no-any-return]
        # The start of the target is the end of the source.
        rows = memory.repeat_interleave(target.shape[0] // memory.shape[0], dim=0)
        logits = self.model(torch.cat([rows, target[:, 1:]], dim=1), cache=cache)
        return logits[:, memory.shape[1] - 1 :]  # type: ignore[no-any-return]
