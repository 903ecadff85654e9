"""One layer of a decoder."""

from __future__ import annotations

from torch import Tensor, nn

from lmkern.nn.attention import KeyValueCache, SelfAttention
from lmkern.nn.feed_forward import Activation, FeedForward
from lmkern.nn.norm import LayerNorm
from lmkern.nn.positions import Rotary


class Block(nn.Module):
    """The pre-norm block: x += attention(norm(x)), then x += feed_forward(norm(x)). Causal.

    width: E. hidden: F. heads, kv_heads, rotary: as in SelfAttention. dropout falls on what each half adds to
    x. bias: of every linear map and norm. eps: of the norms. Xiong et al. 2020, arXiv:2002.04745.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        kv_heads: int | None = None,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        bias: bool = True,
        rotary: Rotary | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(width, eps=eps, bias=bias)
        self.attention = SelfAttention(
            width, heads, kv_heads=kv_heads, dropout=dropout, bias=bias, rotary=rotary
        )
        self.feed_forward_norm = LayerNorm(width, eps=eps, bias=bias)
        self.feed_forward = FeedForward(width, hidden, activation=activation, dropout=dropout, bias=bias)

    def forward(self, x: Tensor, *, cache: KeyValueCache | None = None) -> Tensor:
        """(B, N, E) -> (B, N, E), in x's dtype or wider: under autocast a float32 x stays float32."""
        x = x + self.attention(self.attention_norm(x), cache=cache)
        return x + self.feed_forward(self.feed_forward_norm(x))  # type: ignore[no-any-return]
