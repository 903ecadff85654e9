"""The feed-forward half of a block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["gelu", "gelu_tanh", "relu", "relu_squared", "silu", "swiglu"]


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _swiglu(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "gelu": F.gelu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
        "relu": F.relu,
        "relu_squared": _relu_squared,
        "silu": F.silu,
        "swiglu": _swiglu,
    }
)


class FeedForward(nn.Module):
    """down(activation(up(x))), then dropout.

    width: E. hidden: F, the width between. up: (F, E); for "swiglu" (2F, E), the gate above the value, and
    silu(gate) * value between (Shazeer 2020, arXiv:2002.05202). down: (E, F).
    activation: "gelu", "gelu_tanh" (GPT-2's), "relu", "relu_squared", "silu" or "swiglu"; ValueError for any
    other.

    forward: (..., E) -> (..., E).
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if activation not in _FUNCTIONS:
            raise ValueError(
                f"FeedForward: activation must be one of {', '.join(get_args(Activation))}; "
                f"got {activation!r}"
            )
        self.activation = activation
        self.up = nn.Linear(width, 2 * hidden if activation == "swiglu" else hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = _FUNCTIONS[self.activation](self.up(x))  # (..., F)
        return self.dropout(self.down(hidden))  # type: ignore[no-any-return]
