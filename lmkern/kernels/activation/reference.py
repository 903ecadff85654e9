"""Activations in eager torch: the specification that every other backend is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from lmkern.kernels.anywhere import unavailable, unsupported
from lmkern.kernels.statistics import wide

__all__ = ["backward", "forward", "unavailable", "unsupported"]


def forward(x: Tensor, bias: Tensor | None, *, function: str, gated: bool) -> Tensor:
    z = wide(x) if bias is None else wide(x) + bias
    if not gated:
        return _FUNCTIONS[function](z)[0].to(x.dtype)
    gate, value = z.chunk(2, dim=1)  # (R, F) each
    return (_FUNCTIONS[function](gate)[0] * value).to(x.dtype)


def backward(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    *,
    function: str,
    gated: bool,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    z, dy_wide = wide(x) if bias is None else wide(x) + bias, wide(dy)
    if gated:
        gate, value = z.chunk(2, dim=1)  # (R, F) each
        f, slope = _FUNCTIONS[function](gate)
        dz = torch.cat((dy_wide * value * slope, dy_wide * f), dim=1)  # (R, 2F)
    else:
        dz = dy_wide * _FUNCTIONS[function](z)[1]
    return dz.to(x.dtype) if needs[0] else None, dz.sum(0) if needs[1] else None


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    below = 0.5 * torch.erfc(-x * math.sqrt(0.5))  # P(X <= x), X standard normal
    density = (-0.5 * x.square()).exp() * (1 / math.sqrt(2 * math.pi))
    return x * below, below + x * density


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = 2 * math.sqrt(2 / math.pi)
    s = torch.sigmoid(scale * (x + 0.044715 * x**3))  # (1 + tanh(u)) / 2 = sigmoid(2 u)
    return x * s, s + x * s * (1 - s) * scale * (1 + 3 * 0.044715 * x.square())


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(x)
    return x * s, s + x * s * (1 - s)


def _relu(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.relu(), (~(x <= 0)).to(x.dtype)


def _relu_squared(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.relu().square(), 2 * x.relu()


# Of x: the function and its derivative.
_FUNCTIONS: Mapping[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = MappingProxyType(
    {
        "gelu": _gelu,
        "gelu_tanh": _gelu_tanh,
        "silu": _silu,
        "relu": _relu,
        "relu_squared": _relu_squared,
    }
)
