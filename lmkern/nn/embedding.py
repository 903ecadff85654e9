"""Vectors of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from lmkern.ops import embedding


class Embedding(torch.nn.Embedding):
    """torch.nn.Embedding, argument for argument and key for key, with an error that says which token came.

    forward: (*) int64 -> (*, embedding_dim). IndexError, on the CPU, for a token outside [0, num_embeddings).
    max_norm, scale_grad_by_freq and sparse are left to torch's kernels.
    """

    def forward(self, input: Tensor) -> Tensor:
        try:
            if self.max_norm is not None or self.scale_grad_by_freq or self.sparse or input.is_nested:
                return super().forward(input)
            return embedding(input, self.weight, padding_idx=self.padding_idx)
        except IndexError as error:
            raise IndexError(
                f"Embedding: tokens must lie in [0, {self.num_embeddings}); "
                f"got {int(input.min())} to {int(input.max())}. Were they made with another tokenizer?"
            ) from error
