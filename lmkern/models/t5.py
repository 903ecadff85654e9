"""An encoder-decoder with relative positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lmkern.models.arguments import check_config, check_tokens
from lmkern.models.config import check_fields, check_heads
from lmkern.models.head import head_loss
from lmkern.models.tied import MayBeTied, tie
from lmkern.nn import Block, CrossAttention, Dropout, Embedding, KeyValueCache, Linear, RMSNorm, SelfAttention
from lmkern.nn.block import in_turn
from lmkern.nn.feed_forward import Activation
from lmkern.nn.residual import closed
from lmkern.ops.relative_bias import bucketed_bias


@dataclass(frozen=True)
class T5Config:
    """The sizes of a T5. ValueError, naming the field, for sizes that do not fit together."""

    vocab_size: int = 4096
    """V, of source and target together."""
    layers: int = 6
    """Blocks of the encoder."""
    decoder_layers: int = 0
    """Blocks of the decoder. 0: as many as layers."""
    heads: int = 8
    """H."""
    head_dim: int = 0
    """D. 0: width / heads."""
    width: int = 512
    """E."""
    feed_forward: int = 0
    """F, the width inside a feed-forward half. 0: 4 * width."""
    activation: Activation = "relu"
    """Between the two maps of a feed-forward half: "relu" in the first T5, "geglu_tanh" since 1.1."""
    dropout: float = 0.1
    """Of embeddings, attention weights, inside feed-forward halves, what each half adds, and at the end."""
    buckets: int = 32
    """Rows of the table of the relative bias."""
    max_distance: int = 128
    """Tokens from which on all distances share a bucket."""
    scaled_scores: bool = False
    """Scores are divided by sqrt(D), as in other Transformers. T5's are not: its queries need a learning rate
    that is smaller by that, and Adam saturates the softmax at any that suits the rest."""
    tied: bool = True
    """The embedding is the head too."""
    scaled: bool = True
    """Logits are scaled by 1 / sqrt(width), as in the first T5; not since 1.1."""
    eps: float = 1e-6
    """Of the norms."""
    pad: int = 0
    """The token in the place of what does not count."""
    start: int = 0
    """The token before the first of a target."""
    end: int = 0
    """The token after the last of a target. 0, as start: the end of text of our tokenizers."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            at_least_1=("vocab_size", "layers", "heads", "width", "max_distance"),
            at_least_0=("decoder_layers", "head_dim", "feed_forward", "pad", "start", "end"),
            probabilities=("dropout",),
            positive=("eps",),
            choices={"activation": Activation},
        )
        check_heads(self, self.width, self.heads, 0, self.head_dim)


class T5Cache:
    """What the decoder keeps of the tokens it has read: the keys and values of its own and of the memory."""

    def __init__(self, layers: int, batch: int, context: int) -> None:
        self.batch = batch
        self.layers = [KeyValueCache(batch, context) for _ in range(layers)]
        self.memory: list[tuple[Tensor, Tensor]] = []

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return self.layers[-1].length

    def reorder(self, rows: Tensor) -> None:
        """Row b goes on from what row rows[b] has read: a step of beam search. rows: (new B,) int64.

        Where several rows share one source, those that come to lie side by side must too: ValueError.
        """
        if self.memory:
            self._reorder_memory(rows)
        for layer in self.layers:
            layer.reorder(rows)
        self.batch = rows.shape[0]

    def _reorder_memory(self, rows: Tensor) -> None:
        before = self.memory[0][0].shape[0]
        beams = self.batch // before
        sources = rows[::beams] // beams
        if not torch.equal(sources.repeat_interleave(beams), rows // beams):
            raise ValueError(
                f"T5Cache.reorder: each {beams} rows side by side must be of one source; got {rows.tolist()}"
            )
        if not torch.equal(sources, torch.arange(before, device=rows.device)):
            self.memory = [(k[sources], v[sources]) for k, v in self.memory]


class T5(MayBeTied):
    """Source and target tokens to logits of the next target token.

    Pre-norm blocks with RMS norm and without biases; no positions but a bias on the scores that depends on
    the distance, one table for the encoder and one for the decoder, shared by their layers; scores unscaled.
    Raffel et al. 2020, arXiv:1910.10683. Initialisation is theirs, so that scores, logits and the stream
    begin at size 1. It draws from torch's default generator.
    """

    def __init__(self, config: T5Config) -> None:
        check_config(config, T5Config)
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width)
        self.encoder_bias = nn.Parameter(torch.empty(config.buckets, config.heads))
        self.decoder_bias = nn.Parameter(torch.empty(config.buckets, config.heads))
        self.encoder = nn.ModuleList(_block(config, decoder=False) for _ in range(config.layers))
        self.encoder_norm = RMSNorm(config.width, eps=config.eps)
        self.decoder = nn.ModuleList(
            _block(config, decoder=True) for _ in range(config.decoder_layers or config.layers)
        )
        self.decoder_norm = RMSNorm(config.width, eps=config.eps)
        self.dropout = Dropout(config.dropout)
        self.head = Linear(config.width, config.vocab_size, bias=False)
        self._initialise()
        if config.tied:
            tie(self)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
        nn.init.normal_(self.embedding.weight)
        if self.config.scaled:
            nn.init.normal_(self.head.weight)
        for table in (self.encoder_bias, self.decoder_bias):
            nn.init.normal_(table, std=1 / math.sqrt(self.config.width))
        if self.config.scaled_scores:
            return
        # Scores are not divided by sqrt(D): the queries begin smaller by that.
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, SelfAttention):
                    queries = module.qkv.weight[: module.heads * module.head_dim]
                    queries /= math.sqrt(module.head_dim)
                elif isinstance(module, CrossAttention):
                    module.query.weight /= math.sqrt(module.head_dim)

    def encode(self, source: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """source (B, N_s) int64 -> memory (B, N_s, E). source_mask: (B, N_s) boolean, False: padding."""
        check_tokens("T5", "source", source)
        mask = _seen(source, source_mask)
        bias = bucketed_bias(
            self.encoder_bias,
            source.shape[1],
            source.shape[1],
            bidirectional=True,
            max_distance=self.config.max_distance,
        )
        x = self.dropout(self.embedding(source))  # (B, N_s, E)
        x = in_turn(self.encoder, x, lambda _: {"mask": mask, "relative_bias": bias})
        return self.dropout(self.encoder_norm(closed(x)))  # type: ignore[no-any-return]

    def decode(
        self,
        target: Tensor,
        memory: Tensor,
        source_mask: Tensor | None = None,
        *,
        cache: T5Cache | None = None,
    ) -> Tensor:
        """target (B, N_t) int64, the start token first -> logits (B, N_t, V): position n is of token n + 1.

        memory, source_mask: from and to encode. Their batch may be a divisor of B: B / their batch rows of
        target, next to each other, then share a source, as the beams of a search do.
        cache: from new_cache; the tokens follow those in it and join it.
        """
        return self.head(self._hidden(target, memory, source_mask, cache))  # type: ignore[no-any-return]

    def forward(self, source: Tensor, target: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """The logits (B, N_t, V) of decode; target begins with the start token."""
        return self.decode(target, self.encode(source, source_mask), source_mask)

    def loss(
        self,
        source: Tensor,
        targets: Tensor,
        source_mask: Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> Tensor:
        """Cross-entropy of the targets in nats: a scalar, or (B, N_t) for "none"; float32, or float64 for it.

        targets: (B, N_t) int64, without the start token; -100 for what does not count, as padding behind.
        """
        hidden = self._hidden(self.shift_right(targets), self.encode(source, source_mask), source_mask, None)
        return head_loss(self.head, hidden, targets, label_smoothing=label_smoothing, reduction=reduction)

    def shift_right(self, targets: Tensor) -> Tensor:
        """What the decoder reads to predict targets (B, N_t): the start token, then all but the last."""
        check_tokens("T5", "targets", targets)
        before = nn.functional.pad(targets[:, :-1], (1, 0), value=self.config.start)
        return before.masked_fill(before == -100, self.config.pad)

    def new_cache(self, batch: int, context: int) -> T5Cache:
        """An empty cache for batch targets of at most context tokens. Use it under torch.inference_mode()."""
        if batch < 1 or context < 1:
            raise ValueError(f"T5.new_cache: batch and context must be at least 1; got {batch}, {context}")
        return T5Cache(len(self.decoder), batch, context)

    def flops_per_token(self, source_length: int, target_length: int) -> float:
        """Floating-point operations to train on one target token, with its share of the source.

        6 for each weight of a matrix product and token that meets it, the head included; attention 12 * H D
        a layer and pair of tokens, halved where a target sees the targets before it.
        """

        def weights(*modules: nn.Module) -> int:
            maps = (part for module in modules for part in module.modules() if isinstance(part, nn.Linear))
            return sum(each.weight.numel() for each in maps)

        crosses = [part for part in self.decoder.modules() if isinstance(part, CrossAttention)]
        of_memory = weights(*(cross.key_value for cross in crosses))
        of_source = weights(self.encoder) + of_memory
        of_target = weights(self.decoder, self.head) - of_memory
        inner = self.config.heads * (self.config.head_dim or self.config.width // self.config.heads)
        pairs = len(self.encoder) * source_length**2 + len(self.decoder) * (
            target_length**2 / 2 + target_length * source_length
        )
        flops = 6.0 * (of_source * source_length + of_target * target_length) + 12.0 * inner * pairs
        return flops / target_length

    def _hidden(
        self, target: Tensor, memory: Tensor, source_mask: Tensor | None, cache: T5Cache | None
    ) -> Tensor:
        """(B, N_t, E): what the head reads."""
        check_tokens("T5", "target", target)
        if memory.shape[0] < 1 or target.shape[0] % memory.shape[0]:
            raise ValueError(
                f"T5: the batch of target must be a multiple of the memory's; got target "
                f"{tuple(target.shape)}, memory {tuple(memory.shape)}"
            )
        mask = _seen(memory, source_mask)
        cached = 0 if cache is None else cache.length
        bias = bucketed_bias(
            self.decoder_bias,
            target.shape[1],
            cached + target.shape[1],
            bidirectional=False,
            max_distance=self.config.max_distance,
        )
        if cache is not None and not cache.memory:
            crosses = (part for part in self.decoder.modules() if isinstance(part, CrossAttention))
            cache.memory = [cross.keys_values(memory) for cross in crosses]
        x = self.dropout(self.embedding(target))  # (B, N_t, E)
        x = in_turn(
            self.decoder,
            x,
            lambda i: {
                "relative_bias": bias,
                "cache": None if cache is None else cache.layers[i],
                "memory": memory if cache is None else cache.memory[i],
                "memory_mask": mask,
            },
        )
        x = self.dropout(self.decoder_norm(closed(x)))
        return x * self.config.width**-0.5 if self.config.scaled else x  # type: ignore[no-any-return]


def _block(config: T5Config, *, decoder: bool) -> Block:
    return Block(
        config.width,
        config.heads,
        config.feed_forward or 4 * config.width,
        head_dim=config.head_dim or None,
        causal=decoder,
        cross=decoder,
        norm="rms",
        softmax_scale=None if config.scaled_scores else 1.0,
        activation=config.activation,
        dropout=config.dropout,
        weight_dropout=config.dropout,
        hidden_dropout=config.dropout,
        bias=False,
        eps=config.eps,
    )


def _seen(source: Tensor, source_mask: Tensor | None) -> Tensor | None:
    """The mask of a source (B, N_s, ...) as attention takes it, (B, 1, 1, N_s)."""
    if source_mask is None:
        return None
    if source_mask.dtype != torch.bool or source_mask.shape != source.shape[:2]:
        raise ValueError(
            f"T5: source_mask must be boolean {tuple(source.shape[:2])}, True: seen; "
            f"got {source_mask.dtype} {tuple(source_mask.shape)}"
        )
    return source_mask[:, None, None, :]
