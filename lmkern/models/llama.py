"""A decoder-only language model with RMS norm, gated feed-forward and grouped heads."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from lmkern.models.arguments import check_config
from lmkern.models.config import check_fields, check_heads, require
from lmkern.models.decoder import Decoder, initialise
from lmkern.models.tied import tie
from lmkern.nn import Block, Embedding, Linear, RMSNorm, Rotary


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a Llama. ValueError, naming the field, for sizes that do not fit together."""

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
    head_width: int = 0
    """D. 0: width / heads."""
    width: int = 384
    """E."""
    feed_forward: int = 0
    """F, the width inside a feed-forward half. 0: 8 / 3 * width, up to the next multiple of 32."""
    rotary_base: float = 10000.0
    """The angle of pair i at position p is p * rotary_base^(-2i / D)."""
    tied: bool = False
    """The embedding is the head too."""
    attention_dropout: float = 0.0
    """Of attention weights."""
    eps: float = 1e-5
    """Of the norms."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            at_least_1=("vocab_size", "context", "layers", "heads", "width"),
            at_least_0=("kv_heads", "head_width", "feed_forward"),
            probabilities=("attention_dropout",),
            positive=("eps", "rotary_base"),
        )
        check_heads(self, self.width, self.heads, self.kv_heads, self.head_width)
        require(self, self.head_dim % 2 == 0, "rotary positions need an even head_dim", f"{self.head_dim}")

    @property
    def head_dim(self) -> int:
        """D."""
        return self.head_width or self.width // self.heads

    @property
    def inner_width(self) -> int:
        """F."""
        return self.feed_forward or math.ceil(8 * self.width / 3 / 32) * 32


class Llama(Decoder):
    """Token ids to logits of the next token: embedding, pre-norm blocks without biases, norm, head.

    Queries and keys are turned by position, the two halves of a head together (`lmkern.nn.Rotary`); the
    feed-forward half is SwiGLU. Matrices begin normal with deviation 0.02, drawn from torch's default
    generator. Touvron et al. 2023, arXiv:2302.13971; grouped heads: arXiv:2307.09288.
    """

    def __init__(self, config: LlamaConfig) -> None:
        check_config(config, LlamaConfig)
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width)
        self.positions = None
        self.dropout = nn.Identity()
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                config.heads,
                config.inner_width,
                kv_heads=config.kv_heads or None,
                head_dim=config.head_dim,
                norm="rms",
                activation="swiglu",
                weight_dropout=config.attention_dropout,
                bias=False,
                rotary=Rotary(config.head_dim, config.context, base=config.rotary_base),
                eps=config.eps,
            )
            for _ in range(config.layers)
        )
        self.norm = RMSNorm(config.width, eps=config.eps)
        self.head = Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            tie(self)
        initialise(self)
