"""One layer of a Transformer: decoder, encoder, or decoder over a memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

from torch import Tensor, nn

from lmkern.nn.attention import KeyValueCache, SelfAttention
from lmkern.nn.cross_attention import CrossAttention, Memory
from lmkern.nn.dropout import Dropout
from lmkern.nn.feed_forward import Activation, FeedForward
from lmkern.nn.norm import LayerNorm, RMSNorm
from lmkern.nn.positions import Rotary
from lmkern.nn.residual import Seam, closed, normed, plain
from lmkern.ops.dispatch import flag

Norm = Literal["layer", "rms"]


def make_norm(norm: Norm, width: int, *, eps: float, bias: bool) -> LayerNorm | RMSNorm:
    """LayerNorm, or RMSNorm, which has no bias. ValueError for another name."""
    if norm not in get_args(Norm):
        raise ValueError(f"Block: norm must be 'layer' or 'rms'; got {norm!r}")
    return LayerNorm(width, eps=eps, bias=bias) if norm == "layer" else RMSNorm(width, eps=eps)


class Block(nn.Module):
    """x += attention(norm(x)), then x += feed_forward(norm(x)); with cross, cross(norm(x), memory) between.

    width: E. hidden: F. heads, kv_heads, head_dim, rotary, causal, softmax_scale: as in SelfAttention.
    post_norm: x = norm(x + half(x)) instead, as in Vaswani et al. 2017; pre-norm: Xiong et al. 2020,
    arXiv:2002.04745. norm: "layer" or "rms". eps: of the norms. bias: of every linear map and layer norm.
    dropout falls on what each half adds to x, weight_dropout on attention weights, hidden_dropout inside the
    feed-forward half.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = True,
        cross: bool = False,
        post_norm: bool = False,
        norm: Norm = "layer",
        softmax_scale: float | None = None,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        weight_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        bias: bool = True,
        rotary: Rotary | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        causal, cross = flag("Block", "causal", causal), flag("Block", "cross", cross)
        post_norm, bias = flag("Block", "post_norm", post_norm), flag("Block", "bias", bias)
        shared: dict[str, Any] = {
            "head_dim": head_dim,
            "softmax_scale": softmax_scale,
            "weight_dropout": weight_dropout,
            "bias": bias,
        }
        self.post_norm = post_norm
        self.attention_norm = make_norm(norm, width, eps=eps, bias=bias)
        self.attention = SelfAttention(
            width, heads, kv_heads=kv_heads, causal=causal, rotary=rotary, **shared
        )
        if cross:
            self.cross_norm = make_norm(norm, width, eps=eps, bias=bias)
            self.cross_attention = CrossAttention(width, heads, **shared)
        self.feed_forward_norm = make_norm(norm, width, eps=eps, bias=bias)
        self.feed_forward = FeedForward(
            width, hidden, activation=activation, hidden_dropout=hidden_dropout, bias=bias
        )
        self.dropout = Dropout(dropout)

    def forward(
        self,
        x: Tensor | Seam,
        *,
        mask: Tensor | None = None,
        relative_bias: Tensor | None = None,
        cache: KeyValueCache | None = None,
        memory: Memory | None = None,
        memory_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        close: bool = True,
    ) -> Tensor | Seam:
        """(B, N, E) -> (B, N, E), in x's dtype or wider: under autocast a float32 x stays float32.

        mask, relative_bias, cache, cu_seqlens: of the self-attention. memory, memory_mask: what a block with
        cross sees, all of x the same.
        x, close: `in_turn` hands a Seam from block to block.
        """
        options = {"mask": mask, "relative_bias": relative_bias, "cache": cache, "cu_seqlens": cu_seqlens}
        x = self._add(x, self.attention_norm, self.attention, **options)
        if memory is not None:
            if not hasattr(self, "cross_attention"):
                raise ValueError("Block: a memory is for a block with cross=True; got one without")
            x = self._add(x, self.cross_norm, self.cross_attention, memory=memory, mask=memory_mask)
        x = self._add(x, self.feed_forward_norm, self.feed_forward)
        return closed(x) if close else x

    def _add(self, x: Tensor | Seam, norm: nn.Module, half: nn.Module, **arguments: Any) -> Tensor | Seam:
        if self.post_norm:
            x = closed(x)
            return normed(norm, Seam.of(x, half(x, **arguments), self.dropout).wide())[0]
        y, x = normed(norm, x)
        return Seam.of(x, half(y, **arguments), self.dropout)


def in_turn(
    blocks: Iterable[nn.Module], x: Tensor, arguments: Callable[[int], dict[str, Any]] = lambda _: {}
) -> Tensor | Seam:
    """x through blocks, each called with arguments(place); the next one's norm joins what each adds.

    A module that is no Block, or that somebody listens to, is given the sum and gives it.
    """
    stream: Tensor | Seam = x
    for place, block in enumerate(blocks):
        if plain(block, Block):
            stream = block(stream, close=False, **arguments(place))
        else:
            stream = block(closed(stream), **arguments(place))
    return stream
