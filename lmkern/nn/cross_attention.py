"""Attention of one sequence over another."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from lmkern.nn.linear import Linear
from lmkern.nn.stream import check_stream, takes_dtype
from lmkern.ops import attention
from lmkern.ops.dispatch import flag

Memory = Tensor | tuple[Tensor, Tensor]


class CrossAttention(nn.Module):
    """Every token of x sees every token of a memory that its mask shows.

    width: E. heads: H. head_dim: D, default E / H. softmax_scale: default 1 / sqrt(D).
    weight_dropout falls on the attention weights. bias: of the three linear maps.

    query: (H D, E). key_value: (2 H D, E), the keys above the values. out: (E, H D). Raises ValueError for a
    width that heads do not divide.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        head_dim: int | None = None,
        softmax_scale: float | None = None,
        weight_dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        bias = flag("CrossAttention", "bias", bias)
        if heads < 1 or (head_dim is None and width % heads):
            raise ValueError(f"CrossAttention: width must be a multiple of heads; got {width}, {heads}")
        self.width, self.heads, self.head_dim = width, heads, head_dim or width // heads
        self.softmax_scale, self.weight_dropout = softmax_scale, weight_dropout
        self.query = Linear(width, heads * self.head_dim, bias=bias)
        self.key_value = Linear(width, 2 * heads * self.head_dim, bias=bias)
        self.out = Linear(heads * self.head_dim, width, bias=bias)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """memory (B, N_k, E) -> keys and values, views (B, H, N_k, D) of one product."""
        both = self.key_value(memory).view(*memory.shape[:2], 2 * self.heads, self.head_dim)
        k, v = both.transpose(1, 2).chunk(2, dim=1)
        return k, v

    @takes_dtype("x", "memory")
    def forward(self, x: Tensor, memory: Memory, *, mask: Tensor | None = None) -> Tensor:
        """x (B * beams, N_q, E) -> the same shape.

        memory: (B, N_k, E), or what keys_values made of it. mask: boolean, broadcasts to (B, H, 1, N_k).
        beams rows of x, next to each other, may share one row of the memory: its keys are read once for all.
        """
        check_stream(self, "x", x, self.width)
        if isinstance(memory, Tensor):
            check_stream(self, "memory", memory, self.width)
            k, v = self.keys_values(memory)
        else:
            k, v = memory
        # The tokens of the beams are so many queries of one sequence: none sees another.
        q = self.query(x).view(k.shape[0], -1, self.heads, self.head_dim).transpose(1, 2)
        y = attention(
            q,
            k,
            v,
            mask=mask,
            softmax_scale=self.softmax_scale,
            dropout_p=self.weight_dropout if self.training else 0.0,
        )
        y = cast(Tensor, y).transpose(1, 2).reshape(*x.shape[:2], self.heads * self.head_dim)
        return self.out(y)  # type: ignore[no-any-return]
