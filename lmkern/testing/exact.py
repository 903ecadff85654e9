"""Attention, norms and cross-entropy in numpy's long double, from the formulas alone.

What float64 kernels are measured against, and a second opinion on the reference. On x86 a long double has 11
bits more than a float64; where it has none more, float64 kernels are measured against their equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmkern.kernels.philox import keep_mask
from lmkern.testing.shapes import AttentionShape

Array = np.ndarray[Any, np.dtype[Any]]


def long_double(x: Tensor) -> Array:
    """A tensor's elements, exactly."""
    return x.detach().cpu().to(torch.float64).numpy().astype(np.longdouble)


def _floating(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    shape: AttentionShape,
    dlse: Tensor | None = None,
    options: dict[str, Any] | None = None,
    *,
    absolute: bool = False,
) -> dict[str, Array]:
    """out, lse, dq, dk and dv of `lmkern.attention` with the default scale, and d<name> of floating options.

    options: its keywords; default causal as the shape says. absolute: in d<name> the absolute values of the
        terms are added up, which is what their rounding errors are to be compared with.
    """
    options = {"causal": shape.causal} if options is None else options
    floating = {name: long_double(x) for name, x in options.items() if _floating(x)}
    inputs = {"q": q, "k": k, "v": v, **{name: options[name] for name in floating}}
    results = {f"d{name}": np.zeros(tuple(x.shape), np.longdouble) for name, x in inputs.items()}
    results["out"] = np.zeros(tuple(q.shape), np.longdouble)
    results["lse"] = np.zeros(tuple(q.shape[:3]), np.longdouble)
    q_, k_, v_, dout_ = (long_double(x) for x in (q, k, v, dout))
    dlse_ = None if dlse is None else long_double(dlse)
    for number, queries, keys in _sequences(shape, options):
        part = _sequence(
            q_[:, :, queries], k_[:, :, keys], v_[:, :, keys], dout_[:, :, queries],
            None if dlse_ is None else dlse_[:, :, queries], {**options, **floating}, number, absolute,
        )  # fmt: skip
        for name, value in part.items():
            if name in ("out", "lse", "dq"):
                results[name][:, :, queries] = value
            elif name in ("dk", "dv"):
                results[name][:, :, keys] = value
            else:
                results[name] += value
    return results


def _sequences(shape: AttentionShape, options: dict[str, Any]) -> Iterator[tuple[int, slice, slice]]:
    if "cu_seqlens" not in options:
        yield 0, slice(None), slice(None)
        return
    queries, keys = options["cu_seqlens"].tolist(), options["cu_seqlens_k"].tolist()
    for number in range(len(queries) - 1):
        yield number, slice(*queries[number : number + 2]), slice(*keys[number : number + 2])


def _sequence(
    q: Array, k: Array, v: Array, dout: Array, dlse: Array | None, options: dict[str, Any], number: int,
    absolute: bool,
) -> dict[str, Array]:  # fmt: skip
    """The same for sequences that are not packed, the first one of them having this number."""
    heads_kv, n_q, n_k = k.shape[1], q.shape[2], k.shape[2]
    group = q.shape[1] // heads_kv
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    scale = 1 / np.sqrt(np.longdouble(q.shape[3]))
    scores = q @ k.swapaxes(2, 3) * scale  # (B, H, N_q, N_k)
    slope = np.ones_like(scores)  # of the soft cap
    if softcap := options.get("softcap"):
        tanh = np.tanh(scores / softcap)
        scores, slope = softcap * tanh, 1 - tanh**2
    offset = np.arange(n_k) - np.arange(n_q)[:, None] - (n_k - n_q)  # j - p
    left, right = options.get("window") or (None, None)
    right = 0 if options.get("causal") else right
    visible = np.full(scores.shape, True)
    visible &= True if left is None else offset >= -left
    visible &= True if right is None else offset <= right
    if "mask" in options:
        visible &= options["mask"].cpu().numpy()
    if "bias" in options:
        scores = scores + options["bias"]
    if "relative_bias" in options:
        scores = scores + options["relative_bias"][:, offset + options["relative_bias"].shape[1] // 2]
    if "alibi_slopes" in options:
        scores = scores - options["alibi_slopes"][:, None, None] * abs(offset)
    scores = np.where(visible, scores, -np.inf)
    row_max = scores.max(3, initial=-np.inf, keepdims=True)
    if "sinks" in options:
        row_max = np.maximum(row_max, options["sinks"][:, None, None])
    row_max = np.where(np.isinf(row_max), 0, row_max)
    weights = np.exp(scores - row_max)
    row_sum = weights.sum(3, keepdims=True)
    sink = np.exp(options["sinks"][:, None, None] - row_max) if "sinks" in options else 0 * row_max
    row_sum = row_sum + sink
    with np.errstate(divide="ignore"):
        lse = (row_max + np.log(row_sum))[..., 0]
    row_sum = np.where(row_sum == 0, 1, row_sum)
    weights, sink = weights / row_sum, sink / row_sum
    keep = np.ones((), np.longdouble)
    if p := options.get("dropout_p"):
        keep = long_double(keep_mask(options["dropout_seed"].cpu(), p, scores.shape, outermost=number))
        keep = keep * 65536 / (65536 - round(p * 65536))
    out = (weights * keep) @ v
    dweights = dout @ v.swapaxes(2, 3) * keep
    # A row of softmax weights sums to 1: its gradient loses its weighted mean.
    mean = (weights * dweights).sum(3, keepdims=True)
    if dlse is not None:
        mean = mean - dlse[..., None]
    dscores = weights * (dweights - mean)
    dproducts = dscores * slope * scale

    def of_groups(x: Array) -> Array:
        return np.asarray(x.reshape(x.shape[0], heads_kv, group, n_k, x.shape[3]).sum(2))

    results = {
        "out": out,
        "lse": lse,
        "dq": dproducts @ k,
        "dk": of_groups(dproducts.swapaxes(2, 3) @ q),
        "dv": of_groups((weights * keep).swapaxes(2, 3) @ dout),
    }
    terms, sink_terms = dscores, -sink * mean
    if absolute:
        # A term of a row that one key has to itself is a difference of two that are as large as this.
        terms, sink_terms = weights * (abs(dweights) + abs(mean)), abs(sink_terms)
    if "bias" in options:
        broadcast = tuple(d for d, size in enumerate(options["bias"].shape) if size == 1)
        results["dbias"] = terms.sum(broadcast, keepdims=True)
    if "relative_bias" in options:
        rows = np.zeros((q.shape[1], options["relative_bias"].shape[1]), np.longdouble)
        for diagonal in np.unique(offset):
            along = terms[:, :, offset == diagonal].sum((0, 2))
            rows[:, diagonal + rows.shape[1] // 2] = along
        results["drelative_bias"] = rows if len(options["relative_bias"]) > 1 else rows.sum(0, keepdims=True)
    if "alibi_slopes" in options:
        results["dalibi_slopes"] = -(terms * abs(offset)).sum((0, 2, 3))
    if "sinks" in options:
        results["dsinks"] = sink_terms.sum((0, 2, 3))
    return results


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, eps: float) -> dict[str, Array]:
    """y, dx, dweight and dbias for x (R, E)."""
    x_, weight_, bias_, dy_ = (long_double(t) for t in (x, weight, bias, dy))
    centred = x_ - x_.mean(1, keepdims=True)
    rstd = 1 / np.sqrt((centred**2).mean(1, keepdims=True) + np.longdouble(eps))
    x_hat = centred * rstd
    g = dy_ * weight_
    dx = (g - g.mean(1, keepdims=True) - x_hat * (g * x_hat).mean(1, keepdims=True)) * rstd
    return {"y": x_hat * weight_ + bias_, "dx": dx, "dweight": (dy_ * x_hat).sum(0), "dbias": dy_.sum(0)}


def rms_norm(x: Tensor, weight: Tensor, dy: Tensor, eps: float, offset: float = 0.0) -> dict[str, Array]:
    """y, dx and dweight for x (R, E)."""
    x_, weight_, dy_ = (long_double(t) for t in (x, weight, dy))
    rstd = 1 / np.sqrt((x_**2).mean(1, keepdims=True) + np.longdouble(eps))
    x_hat = x_ * rstd
    g = dy_ * (offset + weight_)
    dx = (g - x_hat * (g * x_hat).mean(1, keepdims=True)) * rstd
    return {"y": x_hat * (offset + weight_), "dx": dx, "dweight": (dy_ * x_hat).sum(0)}


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
    rows, hit = np.arange(len(logits_)), targets.cpu().numpy()
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


def activation(x: Tensor, bias: Tensor, dy: Tensor, function: str, *, gated: bool) -> dict[str, Array]:
    """y, dx and dbias for x (R, W)."""
    z, dy_ = long_double(x) + long_double(bias), long_double(dy)
    gate, value = np.split(z, 2, axis=1) if gated else (z, np.ones_like(z))
    f, slope = _FUNCTIONS[function](gate)
    halves = (dy_ * value * slope, dy_ * f) if gated else (dy_ * slope,)
    dx = np.concatenate(halves, axis=1)
    return {"y": f * value, "dx": dx, "dbias": dx.sum(0)}


def adamw(
    param: Tensor,
    grads: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> Array:
    """The parameter after a step with each gradient, the moments being zero before."""
    x, (b1, b2) = long_double(param), (np.longdouble(beta1), np.longdouble(beta2))
    mean, square = np.zeros_like(x), np.zeros_like(x)
    for step, grad in enumerate(map(long_double, grads), start=1):
        mean, square = b1 * mean + (1 - b1) * grad, b2 * square + (1 - b2) * grad**2
        size = np.sqrt(square / (1 - b2**step)) + np.longdouble(eps)
        rate = np.longdouble(lr)
        x = x * (1 - rate * np.longdouble(weight_decay)) - rate * mean / (1 - b1**step) / size
    return np.asarray(x)


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
