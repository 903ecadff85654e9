"""A decoder-only language model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lmkern.models.arguments import check_config
from lmkern.models.config import check_fields, check_heads, require
from lmkern.models.decoder import Decoder, initialise
from lmkern.models.tied import tie
from lmkern.nn import (
    Block,
    Dropout,
    Embedding,
    LayerNorm,
    LearnedPositions,
    Linear,
    Rotary,
    SinusoidalPositions,
)
from lmkern.nn.feed_forward import Activation

Positions = Literal["rotary", "learned", "sinusoidal"]


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a GPT. ValueError, naming the field, for sizes that do not fit together."""

    vocab_size: int = 4096
    """V."""
    context: int = 256
    """The most tokens it reads at once."""
    layers: int = 6
    """Blocks."""
    heads: int = 6
    """H, query heads."""
    kv_heads: int = 0
    """H_kv, key and value heads, a divisor of heads. 0: as many as heads."""
    width: int = 384
    """E, a multiple of heads."""
    feed_forward: int = 0
    """F, the width inside a feed-forward half. 0: 4 * width."""
    dropout: float = 0.0
    """Of the embedding and of what each half of a block adds."""
    attention_dropout: float = 0.0
    """Of attention weights."""
    positions: Positions = "rotary"
    """How the model knows where a token stands."""
    bias: bool = False
    """Of every linear map (but the head) and norm."""
    activation: Activation = "gelu"
    """Between the two maps of a feed-forward half."""
    eps: float = 1e-5
    """Of the norms."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            at_least_1=("vocab_size", "context", "layers", "heads", "width"),
            at_least_0=("kv_heads", "feed_forward"),
            probabilities=("dropout", "attention_dropout"),
            positive=("eps",),
            choices={"positions": Positions, "activation": Activation},
        )
        check_heads(self, self.width, self.heads, self.kv_heads)
        require(
            self,
            self.positions != "rotary" or self.head_dim % 2 == 0,
            "rotary positions need an even head_dim (width / heads)",
            f"{self.head_dim}",
        )

    @property
    def head_dim(self) -> int:
        """D."""
        return self.width // self.heads


class GPT(Decoder):
    """Token ids to logits of the next token: embedding, pre-norm blocks, norm, and the embedding as the head.

    head.weight is embedding.weight, (V, E); the state_dict holds it once, as "embedding.weight".
    Initialisation is GPT-2's: normal with deviation 0.02, divided by sqrt(2 * layers) for the two maps of
    each block that add to the residual stream; biases zero. It draws from torch's default generator. Under
    autocast the residual stream stays float32 and the matrix products are in the autocast dtype. Radford et
    al. 2019, "Language models are unsupervised multitask learners".
    """

    def __init__(self, config: GPTConfig) -> None:
        check_config(config, GPTConfig)
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width)
        self.positions = None
        turns = config.positions == "rotary"
        if config.positions == "learned":
            self.positions = LearnedPositions(config.context, config.width)
        elif not turns:
            self.positions = SinusoidalPositions(config.width)
        # Sines and cosines are of size 1: an embedding of size 0.02 would drown in them
        # (Vaswani et al. 2017, section 3.4).
        self.embedding_scale = math.sqrt(config.width) if config.positions == "sinusoidal" else 1.0
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                config.heads,
                config.feed_forward or 4 * config.width,
                kv_heads=config.kv_heads or None,
                activation=config.activation,
                dropout=config.dropout,
                weight_dropout=config.attention_dropout,
                bias=config.bias,
                # One each: torch.func cannot put back the buffers of a module under several names.
                rotary=Rotary(config.head_dim, config.context) if turns else None,
                eps=config.eps,
            )
            for _ in range(config.layers)
        )
        self.norm = LayerNorm(config.width, eps=config.eps, bias=config.bias)
        self.head = Linear(config.width, config.vocab_size, bias=False)
        tie(self)
        initialise(self, residual_scale=1 / math.sqrt(2 * config.layers))
