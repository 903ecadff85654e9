"""The feed-forward half of a block."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from torch import Tensor, nn

from lmkern.nn.dropout import Dropout
from lmkern.nn.linear import Linear, plain_linear
from lmkern.nn.stream import takes_dtype
from lmkern.ops import activation as fused_activation
from lmkern.ops import linear as product
from lmkern.ops.activation import Function
from lmkern.ops.dispatch import flag

Activation = Literal["gelu", "gelu_tanh", "relu", "relu_squared", "silu", "geglu", "geglu_tanh", "swiglu"]

# What each makes of its input, and whether it gates.
_FORMS: Mapping[Activation, tuple[Function, bool]] = MappingProxyType(
    {
        "gelu": ("gelu", False),
        "gelu_tanh": ("gelu_tanh", False),
        "relu": ("relu", False),
        "relu_squared": ("relu_squared", False),
        "silu": ("silu", False),
        "geglu": ("gelu", True),
        "geglu_tanh": ("gelu_tanh", True),
        "swiglu": ("silu", True),
    }
)


class FeedForward(nn.Module):
    """down(activation(up(x))).

    width: E. hidden: F, the width between. up: (F, E); for "geglu", "geglu_tanh" and "swiglu" (2F, E), the
    gate above the value, and gelu(gate) * value or silu(gate) * value between (Shazeer 2020,
    arXiv:2002.05202). down: (E, F).
    activation: "gelu", "gelu_tanh" (GPT-2's), "relu", "relu_squared", "silu", "geglu", "geglu_tanh"
    (T5 1.1's) or "swiglu"; ValueError for any other.
    hidden_dropout falls on what stands between the maps.

    forward: (..., E) -> (..., E).
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: Activation = "gelu",
        hidden_dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        bias = flag("FeedForward", "bias", bias)
        if activation not in _FORMS:
            raise ValueError(
                f"FeedForward: activation must be one of {', '.join(_FORMS)}; got {activation!r}"
            )
        self.activation = activation
        self.function, self.gated = _FORMS[activation]
        self.up = Linear(width, 2 * hidden if self.gated else hidden, bias=bias)
        self.down = Linear(hidden, width, bias=bias)
        self.hidden_dropout = Dropout(hidden_dropout)

    @takes_dtype("x")
    def forward(self, x: Tensor) -> Tensor:
        hidden = mapped(self.up, x, self.function, gated=self.gated)  # (..., F)
        return self.down(self.hidden_dropout(hidden))  # type: ignore[no-any-return]


def mapped(linear: nn.Module, x: Tensor, function: Function, *, gated: bool = False) -> Tensor:
    """activation(linear(x))."""
    if not plain_linear(linear):
        return fused_activation(linear(x), None, function, gated=gated)
    # The activation adds the bias: its gradient then needs no pass of its own.
    return fused_activation(product(x, linear.weight), linear.bias, function, gated=gated)
