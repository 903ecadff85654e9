"""How a row is timed: ours and its competitors in turn, in one run, and the ratio of each round.

A machine's speed drifts, so two numbers from two moments do not compare. In a round every competitor runs
once and then ours once, the competitors in turns forwards and backwards (eager, compile, ours, compile,
eager, ours, ...), since each finds the caches as the one before left them; a time includes the release of
the results. The competitors run in the set-up that pytest-benchmark calls before each of its rounds, so its
own statistics are ours. What is reported is the median of each, and the median over the rounds of their
time / our time: above 1, ours is faster. Warm-up, and with it compilation, comes before the first round.

Forward is timed without gradients. Backward is timed alone: `torch.autograd.grad` over one graph that is
kept, so torch.compile may not write over the tensors in it (`donated_buffer` off). "both" is one after the
other, each time on a new graph.

On a GPU a time is that of benchmarks/gpu_timing.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from benchmarks import gpu_timing
from benchmarks.contest import Inputs

Call = Callable[[], Any]

MIN_ROUNDS, MAX_ROUNDS = 7, 101
WARM_UPS = 2
# Of rounds that take longer than this, in seconds, three do, after one to warm up.
LONG_ROUND, LONG_ROUNDS = 10.0, 3
# The rounds of one row together, in seconds, unless MIN_ROUNDS needs more.
BUDGET = 1.0
# A candidate this many times slower than another at first sight is not timed on.
HOPELESS = 3.0
# Norm of the difference / norm of torch's result. The tests hold the fine bound; this one catches a kernel
# that is wrong at a shape that only the benchmark has.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}

# Elements that are compared at once.
PART = 2**26


def clock() -> float:
    """Seconds, once every GPU is done with what it was given."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(call: Call) -> float:
    if isinstance(call, gpu_timing.Rotation):
        return call.seconds()
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
        if turn > LONG_ROUND:
            break
    fewest = LONG_ROUNDS if turn > LONG_ROUND else MIN_ROUNDS
    rounds = rounds or min(MAX_ROUNDS, max(fewest, int(BUDGET / turn)))
    times: dict[str, list[float]] = {name: [] for name in competitors}
    order = list(competitors)
    on_gpu: list[float] = []

    def run_competitors() -> None:
        for name in order:
            times[name].append(seconds(competitors[name]))
        order.reverse()

    def run_ours() -> None:
        # Returns nothing: the fixture would keep the result alive through the next round.
        if isinstance(ours, gpu_timing.Rotation):
            on_gpu.append(ours.seconds())
        else:
            ours()

    benchmark.pedantic(run_ours, setup=run_competitors, rounds=rounds)
    if benchmark.stats is None:
        return {}
    result = summarise(on_gpu or list(benchmark.stats.stats.data), times)
    for name, call in {"ours": ours, **competitors}.items():
        if isinstance(call, gpu_timing.Rotation):
            row = result["ours"] if name == "ours" else result["competitors"][name]
            row |= {"host": call.host, "way": call.way}
    return result


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
    first = {name: seconds(call) for name, call in candidates.items()}
    hopeful = [name for name in candidates if first[name] <= HOPELESS * min(first.values())]
    if len(hopeful) == 1:
        return hopeful[0]
    times: dict[Any, list[float]] = {name: [] for name in hopeful}
    for _ in range(3):
        for name in hopeful:
            times[name].append(seconds(candidates[name]))
    return min(times, key=lambda name: median(times[name]))


def check_agreement(ours: Tensor | tuple[Tensor, ...], theirs: Tensor | tuple[Tensor, ...]) -> None:
    """AssertionError when a result of ours is not torch's, up to rounding."""
    ours, theirs = ((result,) if isinstance(result, Tensor) else result for result in (ours, theirs))
    for our, their in zip(ours, theirs, strict=True):
        assert our.shape == their.shape, f"ours is {tuple(our.shape)}, torch's {tuple(their.shape)}"
        difference, size = distance(our, their), distance(their, None)
        error = difference / size if size else difference
        # Written so that a NaN fails.
        assert error <= TOLERANCE[their.dtype], f"ours differs from torch by {error:.2e} of the norm"


def distance(x: Tensor, y: Tensor | None) -> float:
    """Norm of x - y, or of x, in float64; in parts, since a large result leaves no room for such a copy."""
    total = 0.0
    parts = x.reshape(-1).split(PART)
    others = repeat(0.0) if y is None else y.reshape(-1).split(PART)
    for part, other in zip(parts, others, strict=False):
        total += float((part.double() - other).square().sum())
    return math.sqrt(total)


def call_of(function: Callable[..., Any], inputs: Inputs, direction: str) -> Call:
    """A call without arguments of one direction of a function; it may repeat.

    "forward" returns the outputs, "backward" and "both" the gradients of the leaves.
    """
    for leaf in inputs.leaves:
        leaf.requires_grad_(direction != "forward")
    if direction == "forward":
        return lambda: function(*inputs.arguments)

    def outputs() -> tuple[Tensor, ...]:
        result = function(*inputs.arguments)
        return (result,) if isinstance(result, Tensor) else result

    if direction == "both":
        return lambda: torch.autograd.grad(outputs(), inputs.leaves, inputs.gradients)
    kept = outputs()
    return lambda: torch.autograd.grad(kept, inputs.leaves, inputs.gradients, retain_graph=True)


def rotated(inputs: Inputs, moved: int) -> list[Inputs]:
    """What a call that moves so many bytes is timed on: on a GPU copies, in turn, that no cache holds."""
    return gpu_timing.copies(inputs, moved) if gpu_timing.used() else [inputs]


def call_on(function: Callable[..., Any], inputs: list[Inputs], direction: str) -> Call:
    """`call_of` on each of the inputs in turn."""
    calls = [call_of(function, one, direction) for one in inputs]
    return gpu_timing.Rotation(calls) if gpu_timing.used() else calls[0]


def peak_bytes(call: Call) -> int | None:
    """The memory that a call holds at its highest point, above what was there before; None where unknown.

    On a GPU as torch's allocator counts it; on Linux by the high-water mark of the process, which sees only
    what the allocator asks the system for (a second call finds workspaces in place; kept memory hides all of
    it) and is exact to a megabyte.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        # Documentation/filesystems/proc.rst: 5 sets the high-water mark to what is resident now.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _resident("VmRSS")
        call()
        return _resident("VmHWM") - before
    except OSError:
        return None


def _resident(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (kibibytes,) = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(kibibytes) * 1024


def kept_graphs() -> AbstractContextManager[Any]:
    """Under this torch.compile makes graphs whose backward pass may run more than once."""
    return functorch_config.patch(donated_buffer=False)  # type: ignore[no-any-return]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """function under torch.compile for one shape, nothing left over from the row before."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)
