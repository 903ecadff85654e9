"""A decoder-only language model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lmkern.models.config import check_fields, check_heads, require
from lmkern.models.tied import tie
from lmkern.nn import (
    Block,
    Embedding,
    KeyValueCache,
    LayerNorm,
    LearnedPositions,
    Rotary,
    SinusoidalPositions,
)
from lmkern.nn.feed_forward import Activation
from lmkern.ops import linear_cross_entropy

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
            probabilities=("dropout",),
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


class GPTCache:
    """What a GPT keeps of the tokens it has read: a KeyValueCache for each layer."""

    def __init__(self, layers: int, batch: int, context: int) -> None:
        self.batch, self.context = batch, context
        self.layers = [KeyValueCache(batch, context) for _ in range(layers)]

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return self.layers[-1].length


class GPT(nn.Module):
    """Token ids to logits of the next token: embedding, pre-norm blocks, norm, and the embedding as the head.

    head.weight is embedding.weight, (V, E); the state_dict holds it once, as "embedding.weight".
    Initialisation is GPT-2's: normal with deviation 0.02, divided by sqrt(2 * layers) for the two maps of
    each block that add to the residual stream; biases zero. It draws from torch's default generator. Under
    autocast the residual stream stays float32 and the matrix products are in the autocast dtype. Radford et
    al. 2019, "Language models are unsupervised multitask learners".
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width)
        self.positions: LearnedPositions | SinusoidalPositions | None = None
        rotary = None
        if config.positions == "rotary":
            rotary = Rotary(config.head_dim, config.context)
        elif config.positions == "learned":
            self.positions = LearnedPositions(config.context, config.width)
        else:
            self.positions = SinusoidalPositions(config.width)
        # Sines and cosines are of size 1: an embedding of size 0.02 would drown in them
        # (Vaswani et al. 2017, section 3.4).
        self.embedding_scale = math.sqrt(config.width) if config.positions == "sinusoidal" else 1.0
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                config.heads,
                config.feed_forward or 4 * config.width,
                kv_heads=config.kv_heads or None,
                activation=config.activation,
                dropout=config.dropout,
                bias=config.bias,
                rotary=rotary,
                eps=config.eps,
            )
            for _ in range(config.layers)
        )
        self.norm = LayerNorm(config.width, eps=config.eps, bias=config.bias)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        tie(self)
        self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() >= 2:
                residual = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.layers) if residual else 0.02)

    def forward(self, tokens: Tensor, *, cache: GPTCache | None = None) -> Tensor:
        """tokens (B, N) int64 -> logits (B, N, V): position n speaks of token n + 1.

        cache: from new_cache; the tokens follow those in it and join it.
        Raises ValueError for another shape or dtype and for more tokens than the context; IndexError, on the
        CPU, for a token that is not in the vocabulary.
        """
        return self.head(self._hidden(tokens, cache))  # type: ignore[no-any-return]

    def loss(self, tokens: Tensor, targets: Tensor, *, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        """Next-token cross-entropy in nats, a float32 scalar (float64 for a float64 model).

        tokens, targets: (B, N) int64; targets[:, n] is the token after tokens[:, n], or -100 for one that
        does not count.
        """
        if targets.shape != tokens.shape or targets.dtype != torch.int64:
            raise ValueError(
                f"GPT.loss: targets must be int64 of tokens' shape {tuple(tokens.shape)}; "
                f"got {targets.dtype} {tuple(targets.shape)}"
            )
        hidden = self._hidden(tokens, None)  # (B, N, E)
        return linear_cross_entropy(hidden, self.head.weight, targets, reduction=reduction)

    def new_cache(self, batch: int) -> GPTCache:
        """An empty cache for batch sequences read side by side. Use it under torch.inference_mode()."""
        if batch < 1:
            raise ValueError(f"GPT.new_cache: batch must be at least 1; got {batch}")
        return GPTCache(self.config.layers, batch, self.config.context)

    def flops_per_token(self, context: int) -> float:
        """Floating-point operations to train on one token, forward and backward, among context tokens.

        6 for each weight of a matrix product, the head included; attention 12 * layers * width * context,
        halved because a causal query sees half of the keys on average.
        """
        weights = sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))
        return 6.0 * weights + 12.0 * self.config.layers * self.config.width * context / 2

    def _hidden(self, tokens: Tensor, cache: GPTCache | None) -> Tensor:
        """(B, N, E): what the head reads."""
        self._check(tokens, cache)
        offset = 0 if cache is None else cache.length
        x = self.embedding(tokens)  # (B, N, E)
        if self.positions is not None:
            table = self.positions(tokens.shape[1], offset=offset, device=x.device)  # (N, E)
            x = x * self.embedding_scale + table.to(x.dtype)
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, cache=None if cache is None else cache.layers[i])
        return self.norm(x)  # type: ignore[no-any-return]

    def _check(self, tokens: Tensor, cache: GPTCache | None) -> None:
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise ValueError(f"GPT: tokens must be (B, N) int64; got {tuple(tokens.shape)} {tokens.dtype}")
        cached = 0 if cache is None else cache.length
        if tokens.shape[1] + cached > self.config.context:
            raise ValueError(
                f"GPT: the context is {self.config.context} tokens; got {tokens.shape[1]}, "
                f"and {cached} in the cache. Give the last ones only, with a new cache"
            )
        if cache is not None and cache.batch != tokens.shape[0]:
            raise ValueError(
                f"GPT: the cache is for a batch of {cache.batch}; got tokens {tuple(tokens.shape)}"
            )
