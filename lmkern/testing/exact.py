"""Attention, layer norm and activations in numpy's long double, from the formulas alone.

What float64 kernels are measured against, and a second opinion on the reference. On x86 a long double has 11
bits more than a float64; where it has none more, float64 kernels are measured against their equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmkern.testing.shapes import AttentionShape

Array = np.ndarray[Any, np.dtype[Any]]


def long_double(x: Tensor) -> Array:
    """A tensor's elements, exactly."""
    return x.detach().cpu().to(torch.float64).numpy().astype(np.longdouble)


def attention(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, shape: AttentionShape, dlse: Tensor | None = None
) -> dict[str, Array]:
    """out, lse, dq, dk and dv of `lmkern.attention` with the default scale."""
    group = shape.H // shape.H_kv
    q_, k_, v_, dout_ = (long_double(x) for x in (q, k, v, dout))
    k_, v_ = (np.repeat(x, group, axis=1) for x in (k_, v_))
    scale = 1 / np.sqrt(np.longdouble(shape.D))
    scores = q_ @ k_.swapaxes(2, 3) * scale  # (B, H, N_q, N_k)
    visible = np.ones(scores.shape[2:], bool)
    if shape.diagonal is not None:
        visible = np.tril(visible, shape.diagonal)
    scores = np.where(visible, scores, -np.inf)
    row_max = scores.max(3, initial=-np.inf, keepdims=True)
    row_max = np.where(np.isinf(row_max), 0, row_max)
    weights = np.exp(scores - row_max)
    row_sum = weights.sum(3, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (row_max + np.log(row_sum))[..., 0]
    weights = weights / np.where(row_sum == 0, 1, row_sum)
    out = weights @ v_
    dweights = dout_ @ v_.swapaxes(2, 3)
    # A row of softmax weights sums to 1: its gradient loses its weighted mean.
    dscores = weights * (dweights - (weights * dweights).sum(3, keepdims=True))
    if dlse is not None:
        dscores = dscores + weights * long_double(dlse)[..., None]

    def of_groups(x: Array) -> Array:
        return np.asarray(x.reshape(shape.B, shape.H_kv, group, shape.N_k, shape.D).sum(2))

    dk = of_groups(dscores.swapaxes(2, 3) @ q_ * scale)
    dv = of_groups(weights.swapaxes(2, 3) @ dout_)
    return {"out": out, "lse": lse, "dq": dscores @ k_ * scale, "dk": dk, "dv": dv}


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, eps: float) -> dict[str, Array]:
    """y, dx, dweight and dbias for x (R, E)."""
    x_, weight_, bias_, dy_ = (long_double(t) for t in (x, weight, bias, dy))
    centred = x_ - x_.mean(1, keepdims=True)
    rstd = 1 / np.sqrt((centred**2).mean(1, keepdims=True) + np.longdouble(eps))
    x_hat = centred * rstd
    g = dy_ * weight_
    dx = (g - g.mean(1, keepdims=True) - x_hat * (g * x_hat).mean(1, keepdims=True)) * rstd
    return {"y": x_hat * weight_ + bias_, "dx": dx, "dweight": (dy_ * x_hat).sum(0), "dbias": dy_.sum(0)}


def activation(x: Tensor, bias: Tensor, dy: Tensor, function: str, *, gated: bool) -> dict[str, Array]:
    """y, dx and dbias for x (R, W)."""
    z, dy_ = long_double(x) + long_double(bias), long_double(dy)
    gate, value = np.split(z, 2, axis=1) if gated else (z, np.ones_like(z))
    f, slope = _FUNCTIONS[function](gate)
    halves = (dy_ * value * slope, dy_ * f) if gated else (dy_ * slope,)
    dx = np.concatenate(halves, axis=1)
    return {"y": f * value, "dx": dx, "dbias": dx.sum(0)}


def _gelu(x: Array) -> tuple[Array, Array]:
    # P(X <= x) = 1 / 2 + density (x + x^3 / 3 + x^5 / (3 5) + ...), whose terms have one sign.
    density = np.exp(-x * x / 2) / np.sqrt(2 * np.longdouble(np.pi))
    term = total = x
    for odd in range(3, 600, 2):
        term = term * x * x / odd
        total = total + term
    below = 0.5 + density * total
    return x * below, below + x * density


def _gelu_tanh(x: Array) -> tuple[Array, Array]:
    scale, cube = np.sqrt(2 / np.longdouble(np.pi)), np.longdouble("0.044715")
    tanh = np.tanh(scale * (x + cube * x**3))
    return x * (1 + tanh) / 2, (1 + tanh) / 2 + x * (1 - tanh**2) / 2 * scale * (1 + 3 * cube * x**2)


def _silu(x: Array) -> tuple[Array, Array]:
    s = 1 / (1 + np.exp(-x))
    return x * s, s + x * s * (1 - s)


# Of x: the function and its derivative.
_FUNCTIONS: dict[str, Callable[[Array], tuple[Array, Array]]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "relu": lambda x: (np.maximum(x, 0), (x > 0) + np.longdouble(0)),
    "relu_squared": lambda x: (np.maximum(x, 0) ** 2, 2 * np.maximum(x, 0)),
}
