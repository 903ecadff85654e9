"""Attention, layer norm and cross-entropy in numpy's long double, from the formulas alone.

What float64 kernels are measured against, and a second opinion on the reference. On x86 a long double has 11
bits more than a float64; where it has none more, float64 kernels are measured against their equal.
"""

from __future__ import annotations

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


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    dloss: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> dict[str, Array]:
    """loss and dlogits for logits (R, V), none of them ignored."""
    logits_, dloss_ = long_double(logits), long_double(dloss)
    rows, hit = np.arange(len(logits_)), targets.numpy()
    smoothing, z_share = np.longdouble(label_smoothing), np.longdouble(z_loss)
    t = np.tanh(logits_ / softcap) if softcap else logits_
    z = t * softcap if softcap else logits_
    row_max = z.max(1, keepdims=True)
    lse = row_max + np.log(np.exp(z - row_max).sum(1, keepdims=True))
    wanted = np.full(z.shape, smoothing / z.shape[1])
    wanted[rows, hit] += 1 - smoothing
    loss = lse[:, 0] - (wanted * z).sum(1) + z_share * lse[:, 0] ** 2
    dz = np.exp(z - lse) * (1 + 2 * z_share * lse) - wanted
    return {"loss": loss, "dlogits": dz * (1 - t * t if softcap else 1) * dloss_[:, None]}
