"""A mixture of two models, token by token: p = w p_a + (1 - w) p_b."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def interpolate(log_a: Floats, log_b: Floats, weight: float) -> Floats:
    """log(w p_a + (1 - w) p_b) of each token. log_a, log_b: (N,) natural logarithms; 0 <= weight <= 1."""
    _check("interpolate", log_a, log_b)
    if not 0 <= weight <= 1:
        raise ValueError(f"interpolate: weight must lie in [0, 1]; got {weight}")
    # A weight of 0 or 1 is meant: its logarithm, -inf, leaves one model alone.
    with np.errstate(divide="ignore"):
        mixture: Floats = np.logaddexp(log_a + np.log(weight), log_b + np.log1p(-weight))
    return mixture


def fit_weight(log_a: Floats, log_b: Floats) -> float:
    """The weight of a that makes these tokens most likely under the mixture, to 1e-9.

    The log likelihood is concave in w. Its slope, mean((p_a - p_b) / (w p_a + (1 - w) p_b)), falls, and
    bisection finds where it crosses 0.
    """
    _check("fit_weight", log_a, log_b)
    if not len(log_a):
        raise ValueError("fit_weight: expected at least one token; got none. Is the validation split empty?")
    # Only the ratio of the two counts; the larger is made 1 so that nothing overflows.
    larger = np.maximum(log_a, log_b)
    a, b = np.exp(log_a - larger), np.exp(log_b - larger)
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        slope = np.mean((a - b) / (middle * a + (1 - middle) * b))
        low, high = (middle, high) if slope > 0 else (low, middle)
    return (low + high) / 2


def _check(name: str, log_a: Floats, log_b: Floats) -> None:
    if log_a.shape != log_b.shape:
        raise ValueError(
            f"{name}: both models must score the same tokens; got {log_a.shape} and {log_b.shape} "
            "log probabilities. Take both from the same split"
        )
    if not (np.isfinite(log_a).all() and np.isfinite(log_b).all()):
        bad_a, bad_b = (np.count_nonzero(~np.isfinite(log_probs)) for log_probs in (log_a, log_b))
        raise ValueError(
            f"{name}: log probabilities must be finite; got {bad_a} and {bad_b} that are not. "
            "A model whose loss is NaN cannot be evaluated"
        )
