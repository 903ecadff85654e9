"""How wrong a kernel may be, taken from the data: torch's own error in the same dtype is the measure.

Errors are differences from the exact result, counted in units in the last place of its largest element, and
at least half a unit: no result can be expected to round better than that. On every shape the largest error of
a kernel may be twice torch's plus one unit. Over all shapes the geometric mean of the ratios of the typical
(root mean square) errors may be at most one; or 1.05 beside a formula that keeps the weights of attention,
which a kernel recomputes from lse: rounded to float32 it makes the gradients' errors 1.2 to 1.3 times as
large, half a unit or less for the most part. Typical errors, because which element is the worst is chance;
and for the same reason only results of at least 256 elements count there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmkern.testing.exact import Array, long_double

FACTOR = 2.0
GEOMETRIC_MEAN = 1.0
GEOMETRIC_MEAN_BESIDE_WEIGHTS = 1.05
FLOOR = 0.5
ENOUGH_ELEMENTS = 256


@dataclass(frozen=True, slots=True)
class Errors:
    """The largest and the root mean square error of two results, in units in the last place (`unit`)."""

    ours_worst: float
    torchs_worst: float
    ours_typical: float
    torchs_typical: float
    unit: float
    elements: int = ENOUGH_ELEMENTS

    @property
    def ratio(self) -> float:
        """Our typical error over torch's, each at least half a unit."""
        return max(self.ours_typical, FLOOR) / max(self.torchs_typical, FLOOR)


def measure(ours: Tensor, torchs: Tensor, exact: Tensor | Array, *, at_least: float = 0.0) -> Errors:
    """Errors of two results of the same shape and dtype.

    at_least: the size of the exact result below which units are not made smaller, for a result that is a
    difference of terms of that size. Ours must have infinities and NaN exactly where the exact result has
    them: anywhere else they are an infinite error. Where torch has them alone, its error is not counted.
    """
    exact = long_double(exact) if isinstance(exact, Tensor) else exact
    finite = exact[np.isfinite(exact)]
    unit = unit_in_last_place(max(float(abs(finite).max(initial=0)), at_least), ours.dtype)
    torchs_errors = _errors(torchs, exact)
    torchs_errors = torchs_errors[np.isfinite(torchs_errors)]
    our_errors = _errors(ours, exact)
    return Errors(
        ours_worst=float(our_errors.max(initial=0)) / unit,
        torchs_worst=float(torchs_errors.max(initial=0)) / unit,
        ours_typical=_root_mean_square(our_errors) / unit,
        torchs_typical=_root_mean_square(torchs_errors) / unit,
        unit=unit,
        elements=exact.size,
    )


def pooled(draws: Sequence[Errors]) -> Errors:
    """Errors over several draws of the inputs: the largest of one draw is the luck of a row, torch's too."""
    elements = sum(e.elements for e in draws)

    def typical(errors: Sequence[float]) -> float:
        squares = sum(x**2 * e.elements for x, e in zip(errors, draws, strict=True))
        return math.sqrt(squares / max(elements, 1))

    return Errors(
        ours_worst=max(e.ours_worst for e in draws),
        torchs_worst=max(e.torchs_worst for e in draws),
        ours_typical=typical([e.ours_typical for e in draws]),
        torchs_typical=typical([e.torchs_typical for e in draws]),
        unit=max(e.unit for e in draws),
        elements=elements,
    )


def unit_in_last_place(size: float, dtype: torch.dtype) -> float:
    """The distance between neighbouring numbers of dtype at a number of this size."""
    info = torch.finfo(dtype)
    exponent = math.floor(math.log2(max(size, info.tiny)))
    return float(math.ldexp(info.eps, exponent))


def over_budget(name: str, errors: Errors) -> str | None:
    """Why one result is too wrong, in words; None when it is not."""
    allowed = FACTOR * max(errors.torchs_worst, FLOOR) + 1.0
    if errors.ours_worst <= allowed:
        return None
    return (
        f"{name}: the largest error is {errors.ours_worst:.3g} units in the last place ({errors.unit:.2e}); "
        f"torch's is {errors.torchs_worst:.3g}, which allows {allowed:.3g}"
    )


def geometric_mean(errors: Sequence[Errors]) -> float:
    """Of the ratios of our typical errors to torch's, where there are elements enough."""
    logarithms = [math.log(e.ratio) for e in errors if e.elements >= ENOUGH_ELEMENTS]
    return math.exp(sum(logarithms) / max(len(logarithms), 1))


def mean_over_budget(name: str, errors: Sequence[Errors], allowed: float = GEOMETRIC_MEAN) -> str | None:
    """Why a kernel is worse than torch over many shapes, in words; None when it is not."""
    mean = geometric_mean(errors)
    if mean <= allowed:
        return None
    return (
        f"{name}: over {len(errors)} shapes the errors are {mean:.4f} times torch's in the geometric mean; "
        f"expected at most {allowed}"
    )


def _root_mean_square(errors: Array) -> float:
    return float(np.sqrt((errors**2).sum() / max(errors.size, 1)))


def _errors(result: Tensor, exact: Array) -> Array:
    """Absolute differences; infinite where one of the two is not finite and the other is not the same."""
    if tuple(result.shape) != exact.shape:
        raise ValueError(f"error_budget: expected shape {exact.shape}; got {tuple(result.shape)}")
    x = long_double(result)
    same = (x == exact) | (np.isnan(x) & np.isnan(exact))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0, abs(x - exact))
    return np.where(np.isnan(difference), np.inf, difference)
