"""How a row is timed: ours and its competitors in turn, in one run, and the ratio of each round.

A machine's speed drifts, so two numbers from two moments do not compare. In a round every competitor runs
once and then ours once (eager, compile, ours, eager, compile, ours, ...); a time includes the release of
the results. The competitors run in the set-up that pytest-benchmark calls before each of its rounds, so its
own statistics are ours. What is reported is the median of each, and the median over the rounds of their
time / our time: above 1, ours is faster. Warm-up, and with it compilation, comes before the first round.

Forward is timed without gradients. Backward is timed alone: `torch.autograd.grad` over one graph that is
kept, so torch.compile may not write over the tensors in it (`donated_buffer` off).

On a GPU the clock waits for the queue to empty, so a time includes one launch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from statistics import median
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

Call = Callable[[], Any]

MIN_ROUNDS, MAX_ROUNDS = 7, 101
WARM_UPS = 2
# The rounds of one row together, in seconds, unless MIN_ROUNDS needs more.
BUDGET = 2.0
# Norm of the difference / norm of torch's result. The tests hold the fine bound; this one catches a kernel
# that is wrong at a shape that only the benchmark has.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def clock() -> float:
    """Seconds, once every GPU is done with what it was given."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(call: Call) -> float:
    start = clock()
    call()
    return clock() - start


def compare(
    benchmark: Any, ours: Call, competitors: Mapping[str, Call], *, rounds: int = 0
) -> dict[str, Any]:
    """Time ours against each competitor, through pytest-benchmark's fixture.

    rounds: 0 for as many as BUDGET allows. Returns `summarise`'s dictionary, times in seconds; empty under
    --benchmark-disable, where nothing is timed.
    """
    for _ in range(WARM_UPS):
        turn = sum(seconds(call) for call in (*competitors.values(), ours))
    rounds = rounds or min(MAX_ROUNDS, max(MIN_ROUNDS, int(BUDGET / turn)))
    times: dict[str, list[float]] = {name: [] for name in competitors}

    def run_competitors() -> None:
        for name, call in competitors.items():
            times[name].append(seconds(call))

    def run_ours() -> None:
        # Returns nothing: the fixture would keep the result alive through the next round.
        ours()

    benchmark.pedantic(run_ours, setup=run_competitors, rounds=rounds)
    if benchmark.stats is None:
        return {}
    return summarise(list(benchmark.stats.stats.data), times)


def summarise(ours: list[float], competitors: Mapping[str, list[float]]) -> dict[str, Any]:
    """{"rounds", "ours": spread, "competitors": {name: spread and "ratio", "ratio_min", "ratio_max"}}."""
    rows = {}
    for name, theirs in competitors.items():
        ratios = [their / our for their, our in zip(theirs, ours, strict=True)]
        rows[name] = spread(theirs) | {
            "ratio": median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
    return {"rounds": len(ours), "ours": spread(ours), "competitors": rows}


def spread(times: list[float]) -> dict[str, float]:
    return {"median": median(times), "min": min(times), "max": max(times)}


def fastest(candidates: Mapping[Any, Call]) -> Any:
    """The name of the call with the lowest median of three, timed in turn after a warm-up."""
    times: dict[Any, list[float]] = {name: [] for name in candidates}
    for _ in range(4):
        for name, call in candidates.items():
            times[name].append(seconds(call))
    return min(times, key=lambda name: median(times[name][1:]))


def check_agreement(ours: Tensor | tuple[Tensor, ...], theirs: Tensor | tuple[Tensor, ...]) -> None:
    """AssertionError when a result of ours is not torch's, up to rounding."""
    ours, theirs = ((result,) if isinstance(result, Tensor) else result for result in (ours, theirs))
    for our, their in zip(ours, theirs, strict=True):
        error = (our.float() - their.float()).norm() / their.float().norm()
        # Written so that a NaN fails.
        assert error <= TOLERANCE[their.dtype], f"ours differs from torch by {error:.2e} of the norm"


def gradients(out: Tensor, inputs: tuple[Tensor, ...], dout: Tensor) -> Call:
    """A call that runs the backward pass behind out and returns the inputs' gradients; it may repeat."""
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def kept_graphs() -> AbstractContextManager[Any]:
    """Under this torch.compile makes graphs whose backward pass may run more than once."""
    return functorch_config.patch(donated_buffer=False)  # type: ignore[no-any-return]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """function under torch.compile for one shape, nothing left over from the row before."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)
