"""How a call is timed on a GPU: by events on a stream, on inputs that the cache does not hold.

A call is made on several copies of its inputs in turn, so many that a copy comes round again only after four
times the L2 cache was moved. Calls under 100 microseconds are captured into a CUDA graph and its replays are
timed; where a call cannot be captured, and for longer ones, the GPU is kept busy until the host has queued
them all. Either way the time is the GPU's; the host's time to queue a call is measured apart.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import Inputs

Call = Callable[[], Any]

# Of the L2 cache, moved between two calls on the same memory; copies at most.
CACHES, MAX_COPIES = 4, 64
# A shorter call is captured.
CAPTURED = 100e-6
# Of one measurement, in seconds: long beside an event's resolution of half a microsecond.
SPAN = 2e-3
# Calls that are queued while the GPU is busy; a stream holds about a thousand launches.
MAX_QUEUED = 64
# More than a GPU's clock rate in Hz: a wait given in these lasts at least as long as meant.
CLOCK_RATE = 2.5e9


def used() -> bool:
    """Whether benchmarks run on a GPU here."""
    return torch.cuda.is_available()


def stream() -> AbstractContextManager[Any]:
    """A stream of its own for one row, which CUDA graphs need; on a CPU nothing."""
    return torch.cuda.stream(torch.cuda.Stream()) if used() else nullcontext()


@cache
def cache_bytes() -> int:
    """Size of the L2 cache."""
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def copies(inputs: Inputs, moved: int) -> list[Inputs]:
    """The inputs, and as many copies that a call that moves so many bytes finds none of them in the cache."""
    count = min(MAX_COPIES, math.ceil(CACHES * cache_bytes() / max(moved, 1)))
    return [inputs, *(copied(inputs) for _ in range(count - 1))]


def copied(inputs: Inputs) -> Inputs:
    """Inputs of the same values in other memory; a leaf is the same tensor as the argument that it was."""
    clones: dict[int, Tensor] = {}

    def clone(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return clones.setdefault(id(value), value.detach().clone())

    groups = (inputs.arguments, inputs.leaves, inputs.gradients)
    return Inputs(*(tuple(clone(value) for value in group) for group in groups))


class Rotation:
    """Calls that do the same on different memory; calling it makes the next of them."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = list(calls)
        self.place = 0
        self.graph: Any = None
        self.estimate = 0.0
        # Of the host, to queue a call; and how calls were timed: "graph", "queued".
        self.host = 0.0
        self.way = "queued"

    def __call__(self) -> Any:
        call = self.calls[self.place]
        self.place = (self.place + 1) % len(self.calls)
        return call()

    def seconds(self) -> float:
        """Of the GPU, for one call."""
        if not self.estimate:
            self._prepare()
        if self.graph is None:
            return self._queued(min(MAX_QUEUED, max(1, round(SPAN / self.estimate))))
        replays = max(1, round(SPAN / (self.estimate * len(self.calls))))
        return self._measured(self.graph.replay, replays) / len(self.calls)

    def _prepare(self) -> None:
        for _ in self.calls:
            self()
        torch.cuda.synchronize()
        self.host = self._host_seconds(1)
        self.estimate = max(self._queued(8), 1e-9)
        if self.estimate < CAPTURED:
            self.graph = self._captured()
            self.way = "queued" if self.graph is None else "graph"

    def _captured(self) -> Any:
        """All calls once as a CUDA graph; None where one of them cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                for _ in self.calls:
                    self()
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        return graph

    def _queued(self, calls: int) -> float:
        """Seconds of the GPU for one call, of so many that were queued while it waited."""
        self._wait(1.5 * self.host * calls)
        return self._measured(self, calls)

    def _measured(self, call: Call, times: int) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        start = time.perf_counter()
        for _ in range(times):
            call()
        if call is self:
            self.host = min(self.host, (time.perf_counter() - start) / times)
        last.record()
        torch.cuda.synchronize()
        return float(first.elapsed_time(last)) / 1e3 / times

    def _host_seconds(self, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            self()
        passed = (time.perf_counter() - start) / calls
        torch.cuda.synchronize()
        return passed

    @staticmethod
    def _wait(seconds: float) -> None:
        """Keep the GPU busy for at least so long, 50 ms at most."""
        torch.cuda._sleep(int(CLOCK_RATE * min(seconds, 0.05)))
