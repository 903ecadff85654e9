"""How wrong a kernel may be, taken from the data: torch's own error in the same dtype is the measure.

The error of a tensor is its largest absolute difference from the float64 result, at least half a unit in the last place:
no result can be expected to round better than that. A kernel's error may be twice torch's plus one unit, and over many
shapes the geometric mean of the errors' ratios may be at most one: as good as torch, whichever shape one has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0
GEOMETRIC_MEAN = 1.0


@dataclass(frozen=True, slots=True)
class Errors:
    """Errors of one result, in its own unit in the last place (`unit`, of the largest exact element)."""

    ours: float
    torchs: float
    unit: float

    @property
    def ratio(self) -> float:
        """Ours over torch's, each at least half a unit."""
        return max(self.ours, 0.5) / max(self.torchs, 0.5)


def measure(ours: Tensor, torchs: Tensor, exact: Tensor, *, at_least: float = 0.0) -> Errors:
    """Errors of two results of the same shape and dtype against the exact one.

    at_least: a size of the exact result below which units are not made smaller, for a result that is a difference of
    terms of that size. Infinities and NaN must stand where the exact ones do; elsewhere they are an infinite error.
    """
    finite = exact.isfinite()
    size = max(float(exact[finite].abs().max()) if finite.any() else 0.0, at_least)
    unit = unit_in_last_place(size, ours.dtype)
    return Errors(_error(ours, exact) / unit, _error(torchs, exact) / unit, unit)


def unit_in_last_place(size: float, dtype: torch.dtype) -> float:
    """The distance between neighbouring numbers of dtype at a number of this size."""
    info = torch.finfo(dtype)
    exponent = math.floor(math.log2(max(size, info.tiny)))
    return float(math.ldexp(info.eps, exponent))


def over_budget(name: str, errors: Errors) -> str | None:
    """Why one result is too wrong, in words; None when it is not."""
    allowed = FACTOR * max(errors.torchs, 0.5) + 1.0
    if errors.ours <= allowed:
        return None
    return (
        f"{name}: the error is {errors.ours:.3g} units in the last place ({errors.unit:.2e}); "
        f"torch's is {errors.torchs:.3g}, which allows {allowed:.3g}"
    )


def geometric_mean(errors: Sequence[Errors]) -> float:
    """Of the ratios of ours to torch's."""
    return math.exp(sum(math.log(e.ratio) for e in errors) / len(errors))


def mean_over_budget(name: str, errors: Sequence[Errors]) -> str | None:
    """Why a kernel is worse than torch over many shapes, in words; None when it is not."""
    mean = geometric_mean(errors)
    if mean <= GEOMETRIC_MEAN:
        return None
    return (
        f"{name}: over {len(errors)} shapes the errors are {mean:.4f} times torch's in the geometric mean; "
        f"expected at most {GEOMETRIC_MEAN}"
    )


def _error(result: Tensor, exact: Tensor) -> float:
    if result.shape != exact.shape:
        raise ValueError(f"error_budget: expected shape {tuple(exact.shape)}; got {tuple(result.shape)}")
    result = result.detach().to(exact)
    same = (result == exact) | (result.isnan() & exact.isnan())
    difference = torch.where(same, 0.0, (result - exact).abs())
    # NaN or infinity against a number, and a number against NaN or infinity.
    return float(difference.nan_to_num(nan=math.inf).max()) if difference.numel() else 0.0
