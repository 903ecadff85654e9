"""What decoder-only language models share: from tokens through their parts to logits, loss and cache."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lmkern.models.arguments import check_packed, check_targets, check_tokens
from lmkern.models.head import head_loss
from lmkern.models.tied import MayBeTied
from lmkern.nn import KeyValueCache
from lmkern.nn.block import in_turn
from lmkern.nn.positions import positions_within
from lmkern.nn.residual import normed


class DecoderCache:
    """What a decoder keeps of the tokens it has read: a KeyValueCache for each layer."""

    def __init__(self, layers: int, batch: int, context: int) -> None:
        self.batch, self.context = batch, context
        self.layers = [KeyValueCache(batch, context) for _ in range(layers)]

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return self.layers[-1].length

    def reorder(self, rows: Tensor) -> None:
        """Sequence b goes on from what sequence rows[b] has read, as in beam search. rows: (new B,) int64."""
        for layer in self.layers:
            layer.reorder(rows)
        self.batch = rows.shape[0]


class Decoder(MayBeTied):
    """Token ids to logits of the next token.

    A subclass makes the parts: embedding, positions (or None), embedding_scale, dropout, blocks, norm and
    head; its config has context, layers, heads and head_dim. Under autocast the residual stream stays float32
    and the matrix products are in the autocast dtype.
    """

    config: Any
    embedding: nn.Module
    positions: nn.Module | None
    embedding_scale: float = 1.0
    dropout: nn.Module
    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Linear

    def forward(
        self, tokens: Tensor, *, cache: DecoderCache | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """tokens (B, N) int64 -> logits (B, N, V): position n speaks of token n + 1.

        cache: from new_cache; the tokens follow those in it and join it.
        cu_seqlens: (documents + 1,) int32 or int64. B is 1, and document s holds the tokens cu_seqlens[s] to
            cu_seqlens[s + 1]: each is read as if it were alone, and the context bounds each. Without a cache.
        Raises ValueError for another shape or dtype and for more tokens than the context (of packed
        documents, on the CPU); IndexError, on the CPU, for a token that is not in the vocabulary.
        """
        return self.head(self._hidden(tokens, cache, cu_seqlens))  # type: ignore[no-any-return]

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        label_smoothing: float = 0.0,
        reduction: Literal["mean", "sum"] = "mean",
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Next-token cross-entropy in nats, a float32 scalar (float64 for a float64 model).

        tokens, targets: (B, N) int64; targets[:, n] is the token after tokens[:, n], or -100 for one that
        does not count. cu_seqlens: packed documents, as in forward; what follows the last token of one is up
        to targets.
        """
        name = f"{self._name}.loss"
        check_tokens(name, "tokens", tokens)
        check_targets(name, targets, tokens.shape, "of tokens' shape ")
        hidden = self._hidden(tokens, None, cu_seqlens)  # (B, N, E)
        return head_loss(self.head, hidden, targets, label_smoothing=label_smoothing, reduction=reduction)

    def new_cache(self, batch: int) -> DecoderCache:
        """An empty cache for batch sequences read side by side. Use it under torch.inference_mode()."""
        if batch < 1:
            raise ValueError(f"{self._name}.new_cache: batch must be at least 1; got {batch}")
        return DecoderCache(self.config.layers, batch, self.config.context)

    def flops_per_token(self, context: int) -> float:
        """Floating-point operations to train on one token, forward and backward, among context tokens.

        6 for each weight of a matrix product, the head included; attention 12 * layers * heads * head_dim *
        context, halved because a causal query sees half of the keys on average.
        """
        weights: int = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        inner: int = self.config.heads * self.config.head_dim
        layers: int = self.config.layers
        return 6.0 * weights + 12.0 * layers * inner * context / 2

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _hidden(self, tokens: Tensor, cache: DecoderCache | None, cu_seqlens: Tensor | None = None) -> Tensor:
        """(B, N, E): what the head reads."""
        self._check(tokens, cache, cu_seqlens)
        x = self.embedding(tokens)  # (B, N, E)
        if self.positions is not None:
            x = x * self.embedding_scale + self._table(tokens.shape[1], cache, cu_seqlens, x.device).to(
                x.dtype
            )
        x = self.dropout(x)
        packed = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
        x = in_turn(self.blocks, x, lambda i: {"cache": None if cache is None else cache.layers[i], **packed})
        return normed(self.norm, x)[0]

    def _table(
        self, length: int, cache: DecoderCache | None, cu_seqlens: Tensor | None, device: torch.device
    ) -> Tensor:
        """(N, E): the vector of each token's position."""
        assert self.positions is not None
        if cu_seqlens is None:
            return self.positions(length, offset=0 if cache is None else cache.length, device=device)  # type: ignore[no-any-return]
        table: Tensor = self.positions(min(length, self.config.context), device=device)
        return table[positions_within(self._name, cu_seqlens, length)]

    def _check(self, tokens: Tensor, cache: DecoderCache | None, cu_seqlens: Tensor | None) -> None:
        name = self._name
        check_tokens(name, "tokens", tokens)
        if cu_seqlens is not None:
            check_packed(name, tokens, cu_seqlens, self.config.context, cache=cache)
            return
        cached = 0 if cache is None else cache.length
        if tokens.shape[1] + cached > self.config.context:
            raise ValueError(
                f"{name}: the context is {self.config.context} tokens; got {tokens.shape[1]}, "
                f"and {cached} in the cache. Give the last ones only, with a new cache"
            )
        if cache is not None and cache.batch != tokens.shape[0]:
            raise ValueError(
                f"{name}: the cache is for a batch of {cache.batch}; got tokens {tuple(tokens.shape)}"
            )


def initialise(model: nn.Module, residual_scale: float = 1.0) -> None:
    """GPT-2's: normal with deviation 0.02, times residual_scale in what adds to the stream; biases zero."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() >= 2:
            residual = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
            nn.init.normal_(parameter, std=0.02 * residual_scale if residual else 0.02)
