"""An encoder that sees both ways, with heads for masked tokens and for classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lmkern.kernels.checked import checked
from lmkern.models.arguments import check_config, check_packed, check_targets, check_tokens
from lmkern.models.config import check_fields, check_heads
from lmkern.models.decoder import initialise
from lmkern.models.head import head_loss
from lmkern.models.tied import MayBeTied, tie
from lmkern.nn import Block, Dropout, Embedding, LayerNorm, LearnedPositions, Linear
from lmkern.nn.feed_forward import mapped
from lmkern.nn.positions import positions_within
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


class Bert(MayBeTied):
    """Token ids to what the head says.

    Embeddings of token, position and type, norm, and blocks with the norm after each half. Matrices begin
    normal with deviation 0.02, drawn from torch's default generator. Devlin et al. 2018, arXiv:1810.04805.

    head "masked": a map E -> E, activation and norm, then the embedding as the last map, (B, N, V).
    "sequence": the first token through a map E -> E and tanh, dropout, then a map to classes, (B, labels).
    "token": dropout and a map to classes for each token, (B, N, labels).
    """

    def __init__(self, config: BertConfig) -> None:
        check_config(config, BertConfig)
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

    def encode(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        types: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, N) int64 -> the stream after the last block, (B, N, E).

        mask: (B, N) boolean, False: padding, seen by none. types: (B, N) int64, default all 0.
        cu_seqlens: (documents + 1,) int32 or int64. B is 1, and document s holds the tokens cu_seqlens[s] to
            cu_seqlens[s + 1]: each is read as if it were alone, and the context bounds each. Without a mask.
        Raises ValueError for another shape or dtype and for more tokens than the context (of packed
        documents, on the CPU); IndexError, on the CPU, for a token or type that there is not.
        """
        self._check(tokens, mask, types, cu_seqlens)
        types = torch.zeros_like(tokens) if types is None else types
        positions = self.positions(min(tokens.shape[1], self.config.context))  # (N, E)
        if cu_seqlens is not None:
            positions = positions[positions_within("Bert", cu_seqlens, tokens.shape[1])]
        x = self.embedding(tokens) + self.types(types)  # (B, N, E)
        x = self.dropout(self.embedding_norm(x + positions))
        seen = None if mask is None else mask[:, None, None, :]
        packed = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
        for block in self.blocks:
            x = block(x, mask=seen, **packed)
        return x  # type: ignore[no-any-return]

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        types: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """The logits of the head; arguments as in encode. Of packed documents the head "sequence" gives
        (documents, labels), and none of them may be empty."""
        return self.head(self._features(tokens, mask, types, cu_seqlens))  # type: ignore[no-any-return]

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        mask: Tensor | None = None,
        types: Tensor | None = None,
        *,
        reduction: Literal["mean", "sum"] = "mean",
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy of the head's logits in nats, a float32 scalar (float64 for a float64 model).

        targets: (B, N) int64, or (B,), of packed documents (documents,), for the head "sequence"; -100 for
            what does not count, as every token that was not masked. The other arguments as in encode.
        """
        x = self._features(tokens, mask, types, cu_seqlens)
        check_targets("Bert.loss", targets, tokens.shape if x.dim() == 3 else x.shape[:1])
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

    def _features(
        self, tokens: Tensor, mask: Tensor | None, types: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """What the last map reads."""
        x = self.encode(tokens, mask, types, cu_seqlens=cu_seqlens)
        if self.config.head == "masked":
            x = mapped(self.transform, x, self.config.activation)
            return self.transform_norm(x)  # type: ignore[no-any-return]
        if self.config.head == "sequence":
            first = x[:, 0] if cu_seqlens is None else x[0, cu_seqlens[:-1]]
            x = torch.tanh(self.transform(first))
        return self.classifier_dropout(x)  # type: ignore[no-any-return]

    def _check(
        self, tokens: Tensor, mask: Tensor | None, types: Tensor | None, cu_seqlens: Tensor | None
    ) -> None:
        check_tokens("Bert", "tokens", tokens)
        if cu_seqlens is not None:
            check_packed("Bert", tokens, cu_seqlens, self.config.context, mask=mask)
            if self.config.head == "sequence" and not torch.compiler.is_compiling() and checked(cu_seqlens):
                lengths = cu_seqlens.diff().tolist()
                if 0 in lengths:
                    raise ValueError(
                        "Bert: the head 'sequence' reads the first token of each document; got an empty one, "
                        f"document {lengths.index(0)} of {len(lengths)}. Leave it out"
                    )
        elif tokens.shape[1] > self.config.context:
            raise ValueError(
                f"Bert: the context is {self.config.context} tokens; got {tokens.shape[1]}. Cut them"
            )
        for name, x, dtype in (("mask", mask, torch.bool), ("types", types, torch.int64)):
            if x is not None and (x.shape != tokens.shape or x.dtype != dtype):
                raise ValueError(
                    f"Bert: {name} must be {dtype} {tuple(tokens.shape)}; got {x.dtype} {tuple(x.shape)}"
                )
