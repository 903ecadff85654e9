"""An encoder that sees both ways, with heads for masked tokens and for classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lmkern.models.config import check_fields, check_heads
from lmkern.models.decoder import initialise
from lmkern.models.head import head_loss
from lmkern.models.tied import tie
from lmkern.nn import Block, Dropout, Embedding, LayerNorm, LearnedPositions, Linear
from lmkern.nn.feed_forward import mapped
from lmkern.nn.state_dict import LoadsWhole
from lmkern.ops import cross_entropy

Head = Literal["masked", "sequence", "token"]
Function = Literal["gelu", "gelu_tanh", "relu", "silu"]


@dataclass(frozen=True)
class BertConfig:
    """The sizes of a Bert. ValueError, naming the field, for sizes that do not fit together."""

    vocab_size: int = 4096
    """V."""
    context: int = 256
    """The most tokens it reads at once."""
    layers: int = 6
    """Blocks."""
    heads: int = 6
    """H, a divisor of width."""
    width: int = 384
    """E."""
    feed_forward: int = 0
    """F, the width inside a feed-forward half. 0: 4 * width."""
    types: int = 2
    """Kinds of tokens, such as those of the first and of the second sentence."""
    head: Head = "masked"
    """What it says: the tokens of each place, the class of the whole, or the class of each token."""
    labels: int = 2
    """Classes, for the heads that have them."""
    activation: Function = "gelu"
    """Between the two maps of a feed-forward half, and in the head for masked tokens."""
    dropout: float = 0.1
    """Of the embedding and of what each half of a block adds."""
    attention_dropout: float = 0.1
    """Of attention weights."""
    classifier_dropout: float = 0.1
    """Before the map to classes."""
    eps: float = 1e-12
    """Of the norms."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            at_least_1=("vocab_size", "context", "layers", "heads", "width", "types", "labels"),
            at_least_0=("feed_forward",),
            probabilities=("dropout", "attention_dropout", "classifier_dropout"),
            positive=("eps",),
            choices={"head": Head, "activation": Function},
        )
        check_heads(self, self.width, self.heads, 0)


class Bert(LoadsWhole):
    """Token ids to what the head says.

    Embeddings of token, position and type, norm, and blocks with the norm after each half. Matrices begin
    normal with deviation 0.02, drawn from torch's default generator. Devlin et al. 2018, arXiv:1810.04805.

    head "masked": a map E -> E, activation and norm, then the embedding as the last map, (B, N, V).
    "sequence": the first token through a map E -> E and tanh, dropout, then a map to classes, (B, labels).
    "token": dropout and a map to classes for each token, (B, N, labels).
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width)
        self.positions = LearnedPositions(config.context, config.width)
        self.types = Embedding(config.types, config.width)
        self.embedding_norm = LayerNorm(config.width, eps=config.eps)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                config.heads,
                config.feed_forward or 4 * config.width,
                causal=False,
                post_norm=True,
                activation=config.activation,
                dropout=config.dropout,
                weight_dropout=config.attention_dropout,
                eps=config.eps,
            )
            for _ in range(config.layers)
        )
        if config.head != "token":
            self.transform = Linear(config.width, config.width)
        if config.head == "masked":
            self.transform_norm = LayerNorm(config.width, eps=config.eps)
            self.head = Linear(config.width, config.vocab_size)
            tie(self)
        else:
            self.classifier_dropout = Dropout(config.classifier_dropout)
            self.head = Linear(config.width, config.labels)
        initialise(self)

    def encode(self, tokens: Tensor, mask: Tensor | None = None, types: Tensor | None = None) -> Tensor:
        """tokens (B, N) int64 -> the stream after the last block, (B, N, E).

        mask: (B, N) boolean, False: padding, seen by none. types: (B, N) int64, default all 0.
        Raises ValueError for another shape or dtype and for more tokens than the context; IndexError, on the
        CPU, for a token or type that there is not.
        """
        self._check(tokens, mask, types)
        types = torch.zeros_like(tokens) if types is None else types
        x = self.embedding(tokens) + self.types(types)  # (B, N, E)
        x = self.dropout(self.embedding_norm(x + self.positions(tokens.shape[1])))
        seen = None if mask is None else mask[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask=seen)
        return x  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor, mask: Tensor | None = None, types: Tensor | None = None) -> Tensor:
        """The logits of the head; arguments as in encode."""
        return self.head(self._features(tokens, mask, types))  # type: ignore[no-any-return]

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        mask: Tensor | None = None,
        types: Tensor | None = None,
        *,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> Tensor:
        """Cross-entropy of the head's logits in nats, a float32 scalar (float64 for a float64 model).

        targets: (B, N) int64, or (B,) for the head "sequence"; -100 for what does not count, as every token
        that was not masked.
        """
        expected = tokens.shape[:1] if self.config.head == "sequence" else tokens.shape
        if targets.shape != expected or targets.dtype != torch.int64:
            raise ValueError(
                f"Bert.loss: targets must be int64 {tuple(expected)}; "
                f"got {targets.dtype} {tuple(targets.shape)}"
            )
        x = self._features(tokens, mask, types)
        if self.config.head != "masked":
            return cross_entropy(self.head(x), targets, reduction=reduction)
        return head_loss(self.head, x, targets, reduction=reduction)

    def flops_per_token(self, context: int) -> float:
        """Floating-point operations to train on one token among context tokens, forward and backward.

        6 for each weight of a matrix product, the head included; attention 12 * layers * width * context.
        """
        maps = [module for module in self.modules() if isinstance(module, nn.Linear)]
        once = {self.head, self.transform} if self.config.head == "sequence" else set()
        weights = sum(each.weight.numel() / (context if each in once else 1) for each in maps)
        return 6.0 * weights + 12.0 * self.config.layers * self.config.width * context

    def _features(self, tokens: Tensor, mask: Tensor | None, types: Tensor | None) -> Tensor:
        """What the last map reads."""
        x = self.encode(tokens, mask, types)
        if self.config.head == "masked":
            x = mapped(self.transform, x, self.config.activation)
            return self.transform_norm(x)  # type: ignore[no-any-return]
        if self.config.head == "sequence":
            x = torch.tanh(self.transform(x[:, 0]))
        return self.classifier_dropout(x)  # type: ignore[no-any-return]

    def _check(self, tokens: Tensor, mask: Tensor | None, types: Tensor | None) -> None:
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise ValueError(f"Bert: tokens must be (B, N) int64; got {tuple(tokens.shape)} {tokens.dtype}")
        if tokens.shape[1] > self.config.context:
            raise ValueError(
                f"Bert: the context is {self.config.context} tokens; got {tokens.shape[1]}. Cut them"
            )
        for name, x, dtype in (("mask", mask, torch.bool), ("types", types, torch.int64)):
            if x is not None and (x.shape != tokens.shape or x.dtype != dtype):
                raise ValueError(
                    f"Bert: {name} must be {dtype} {tuple(tokens.shape)}; got {x.dtype} {tuple(x.shape)}"
                )
