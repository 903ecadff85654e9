"""Vectors of tokens."""

from __future__ import annotations

import torch
from torch import Tensor


class Embedding(torch.nn.Embedding):
    """torch.nn.Embedding, argument for argument and key for key, with an error that says which token came.

    forward: (*) int64 -> (*, embedding_dim). IndexError, on the CPU, for a token outside [0, num_embeddings).
    """

    def forward(self, input: Tensor) -> Tensor:
        try:
            return super().forward(input)
        except IndexError as error:
            raise IndexError(
                f"Embedding: tokens must lie in [0, {self.num_embeddings}); "
                f"got {int(input.min())} to {int(input.max())}. Were they made with another tokenizer?"
            ) from error
