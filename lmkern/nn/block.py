"""One layer of a Transformer: decoder, encoder, or decoder over a memory."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from lmkern.nn.attention import KeyValueCache, SelfAttention
from lmkern.nn.cross_attention import CrossAttention, Memory
from lmkern.nn.feed_forward import Activation, FeedForward
from lmkern.nn.norm import LayerNorm, RMSNorm
from lmkern.nn.positions import Rotary

Norm = Literal["layer", "rms"]


def make_norm(norm: Norm, width: int, *, eps: float, bias: bool) -> LayerNorm | RMSNorm:
    """LayerNorm, or RMSNorm, which has no bias."""
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
        shared: dict[str, Any] = {
            "head_dim": head_dim,
            "softmax_scale": softmax_scale,
            "dropout": dropout,
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
            width, hidden, activation=activation, dropout=dropout, hidden_dropout=hidden_dropout, bias=bias
        )

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        relative_bias: Tensor | None = None,
        cache: KeyValueCache | None = None,
        memory: Memory | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, N, E) -> (B, N, E), in x's dtype or wider: under autocast a float32 x stays float32.

        mask, relative_bias, cache: of the self-attention. memory, memory_mask: what a block with cross sees.
        """
        x = self._add(
            x, self.attention_norm, self.attention, mask=mask, relative_bias=relative_bias, cache=cache
        )
        if memory is not None:
            x = self._add(x, self.cross_norm, self.cross_attention, memory=memory, mask=memory_mask)
        return self._add(x, self.feed_forward_norm, self.feed_forward)

    def _add(self, x: Tensor, norm: nn.Module, half: nn.Module, **arguments: Any) -> Tensor:
        if self.post_norm:
            return norm(x + half(x, **arguments))  # type: ignore[no-any-return]
        return x + half(norm(x), **arguments)  # type: ignore[no-any-return]
