"""The small language model that tutorials show, with their mistakes put right."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from lmkern.models.arguments import check_tokens
from lmkern.models.config import is_number
from lmkern.nn import Block, Embedding, LayerNorm, Linear, sinusoidal_positions
from lmkern.nn.block import in_turn
from lmkern.nn.residual import normed
from lmkern.nn.state_dict import LoadsWhole


@dataclass(frozen=True)
class TransformerConfig:
    """The arguments of a Transformer, by their names there. ValueError for sizes that do not fit together."""

    input_dim: int
    output_dim: int
    hidden_dim: int
    nhead: int
    num_layers: int
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("input_dim", "output_dim", "hidden_dim", "nhead", "num_layers"):
            value = getattr(self, name)
            if not is_number(value, int):
                raise ValueError(f"Transformer: {name} must be int; got {value!r}")
            if value < 1:
                raise ValueError(f"Transformer: {name} must be at least 1; got {value}")
        if self.hidden_dim % self.nhead:
            raise ValueError(
                f"Transformer: hidden_dim must be a multiple of nhead; got {self.hidden_dim}, {self.nhead}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"Transformer: dropout must lie in [0, 1); got {self.dropout}")


class PositionalEncoder(LoadsWhole):
    """Adds to the vector at each position its row of the sinusoidal table, then dropout.

    d_model: E. forward: (B, N, E) -> (B, N, E), for any N.
    """

    def __init__(self, d_model: int, dropout: float) -> None:
        super().__init__()
        self.d_model = d_model
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[2] != self.d_model:
            raise ValueError(f"PositionalEncoder: x must be (B, N, {self.d_model}); got {tuple(x.shape)}")
        table = sinusoidal_positions(x.shape[1], self.d_model, device=x.device)  # (N, E)
        return self.dropout(x + table.to(x.dtype))  # type: ignore[no-any-return]


class Transformer(LoadsWhole):
    """Token ids (B, N) in, logits (B, output_dim) of the token after the last out.

    input_dim: tokens the embedding knows. output_dim: tokens the head chooses among. hidden_dim: E, the
    width, a multiple of nhead. The feed-forward width is 4 * hidden_dim.

    Embedding, PositionalEncoder, a stack of pre-norm blocks, norm, linear head. Tutorials with this signature
    often get one of these wrong; here

    * attention is softmax(Q K^T / sqrt(d_k)) V, and not a dot product of Q and K alone;
    * every position has its own sines and cosines; one row for all would tell no position from another;
    * the mask is causal: a position sees itself and those before it, never the token it has to predict;
    * the batch is the first dimension everywhere, never the length;
    * dropout is a probability, and is not handed on in the place of the feed-forward width.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        hidden_dim: int,
        nhead: int,
        num_layers: int,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.config = TransformerConfig(input_dim, output_dim, hidden_dim, nhead, num_layers, dropout)
        self.embedding = Embedding(input_dim, hidden_dim)
        # Scaled by sqrt(E) in forward, it is of size 1, as the sines and cosines are.
        nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(hidden_dim))
        self.positional_encoder = PositionalEncoder(hidden_dim, dropout)
        self.blocks = nn.ModuleList(
            Block(hidden_dim, nhead, 4 * hidden_dim, dropout=dropout) for _ in range(num_layers)
        )
        self.norm = LayerNorm(hidden_dim)
        self.head = Linear(hidden_dim, output_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, N) int64, N >= 1 -> (B, output_dim). Raises ValueError for another shape or dtype."""
        return self.head(self._hidden(tokens)[:, -1])  # type: ignore[no-any-return]

    def every_position(self, tokens: Tensor) -> Tensor:
        """tokens (B, N) int64 -> (B, N, output_dim): the logits after each prefix, for training."""
        return self.head(self._hidden(tokens))  # type: ignore[no-any-return]

    def _hidden(self, tokens: Tensor) -> Tensor:
        check_tokens("Transformer", "tokens", tokens)
        if tokens.shape[1] < 1:
            raise ValueError(
                f"Transformer: tokens must be (B, N) int64 with N at least 1; got {tuple(tokens.shape)}"
            )
        x = self.embedding(tokens) * math.sqrt(self.config.hidden_dim)  # (B, N, E)
        x = self.positional_encoder(x)
        return normed(self.norm, in_turn(self.blocks, x))[0]
