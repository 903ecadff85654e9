"""How wrong a kernel may be, taken from the data: torch's own error in the same dtype is the measure.

Errors are differences from the exact result, counted in units in the last place of its largest element, and
at least half a unit: no result can be expected to round better than that. On every shape the largest error of
a kernel and its typical one (root mean square) may be twice torch's. The largest of a few hundred elements is
the luck of a row, torch's too: a result over the budget is judged on more draws of the inputs, all together.

Over all shapes the geometric mean of the ratios of the typical errors may be at most 1.05, and over those of
at least 256 elements one; or 1.05 too beside a formula that keeps the weights of attention, which a kernel
recomputes from lse: that lse is rounded to float32 makes the same formula's gradients 1.2 to 1.3 times as
wrong.

GPU kernels, which have run on no GPU yet, have a unit in the last place beside the first bound.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmkern.testing.exact import Array, long_double

FACTOR = 2.0
GEOMETRIC_MEAN = 1.05
GEOMETRIC_MEAN_OF_MANY_ELEMENTS = 1.0
FLOOR = 0.5
ENOUGH_ELEMENTS = 256
# What is over the budget on one draw of the inputs is judged on so many draws, or on as many as have so many
# elements together, within reason. Attention's float32 gradients have the heaviest tails: after 8 draws the
# ratio of the largest errors still moves by a third.
DRAWS, MOST_DRAWS = 32, 64
# In an interpreter a draw takes seconds; its kernels have a unit beside the bound.
INTERPRETED_DRAWS = 3
JUDGED_ELEMENTS = 4096


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


def over_budget(name: str, errors: Errors, units_beside: float = 0.0) -> str | None:
    """Why one result is too wrong, in words; None when it is not."""
    for norm, ours, torchs in (
        ("largest", errors.ours_worst, errors.torchs_worst),
        ("typical", errors.ours_typical, errors.torchs_typical),
    ):
        allowed = FACTOR * max(torchs, FLOOR) + units_beside
        # Not below it is also what a NaN is.
        if not ours <= allowed:
            return (
                f"{name}: the {norm} error is {ours:.3g} units in the last place ({errors.unit:.2e}); "
                f"torch's is {torchs:.3g}, which allows {allowed:.3g}"
            )
    return None


# The errors of an op's results, by name, for inputs of a seed.
Draw = Callable[[int], Mapping[str, Errors]]


def verdicts(draw: Draw, units_beside: float = 0.0) -> list[str]:
    """Why results on one shape are too wrong, in words: none if they are not."""
    suspects = [name for name, errors in draw(0).items() if over_budget(name, errors, units_beside)]
    interpreted = bool(units_beside)
    judged = [over_budget(name, _judged(draw, name, interpreted), units_beside) for name in suspects]
    return [verdict for verdict in judged if verdict is not None]


def mean_verdicts(
    shapes: Sequence[Draw], units_beside: float, of_many_elements: float = GEOMETRIC_MEAN_OF_MANY_ELEMENTS
) -> list[str]:
    """Why a kernel is worse than torch over many shapes, in words: none if it is not.

    Of kernels that may have units beside, which run in an interpreter on a sample, only results of many
    elements count.
    """
    if units_beside:
        shapes = [functools.partial(_of_many_elements, draw) for draw in shapes]
    found = []
    for name in {name: None for draw in shapes for name in draw(0)}:
        draws = [draw for draw in shapes if name in draw(0)]
        if mean_over_budget(name, [draw(0)[name] for draw in draws], of_many_elements):
            judged = [_judged(draw, name, bool(units_beside)) for draw in draws]
            found.append(mean_over_budget(name, judged, of_many_elements))
    return [verdict for verdict in found if verdict is not None]


def _of_many_elements(draw: Draw, seed: int) -> dict[str, Errors]:
    return {name: errors for name, errors in draw(seed).items() if errors.elements >= ENOUGH_ELEMENTS}


def _judged(draw: Draw, name: str, interpreted: bool) -> Errors:
    """The errors of all draws together, the first one among them."""
    elements = max(draw(0)[name].elements, 1)
    count = min(max(DRAWS, JUDGED_ELEMENTS // elements), MOST_DRAWS)
    if interpreted:
        count = INTERPRETED_DRAWS
    return pooled([draw(seed)[name] for seed in range(count)])


def geometric_mean(errors: Sequence[Errors], elements: int = 0) -> float:
    """Of the ratios of our typical errors to torch's, over results of at least so many elements."""
    logarithms = [math.log(e.ratio) for e in errors if e.elements >= elements]
    return math.exp(sum(logarithms) / max(len(logarithms), 1))


def mean_over_budget(
    name: str, errors: Sequence[Errors], of_many_elements: float = GEOMETRIC_MEAN_OF_MANY_ELEMENTS
) -> str | None:
    """Why a kernel is worse than torch over many shapes, in words; None when it is not."""
    for elements, allowed in ((0, GEOMETRIC_MEAN), (ENOUGH_ELEMENTS, of_many_elements)):
        mean = geometric_mean(errors, elements)
        if not mean <= allowed:
            counted = f" of at least {elements} elements" if elements else ""
            return (
                f"{name}: over {len(errors)} shapes{counted} the errors are {mean:.4f} times torch's in the "
                f"geometric mean; expected at most {allowed}"
            )
    return None


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
