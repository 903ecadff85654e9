"""Timing on a GPU, with torch.cuda's events, graphs and streams played on the host."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_timing, timing
from benchmarks.contest import Inputs

CACHE, SHORT = 4096, 0.02


class Event:
    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, last: Event) -> float:
        return (last.at - self.at) * 1e3


class Graph:
    replays = 0

    def replay(self) -> None:
        Graph.replays += 1


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU with a cache of 4 KiB; captures: what a capture raises, None for one that works."""
    found = SimpleNamespace(captures=None, waited=[])

    @contextmanager
    def capture(graph: Graph, stream: Any) -> Iterator[None]:
        yield
        if found.captures is not None:
            raise found.captures

    monkeypatch.setattr(gpu_timing, "used", lambda: True)
    monkeypatch.setattr(gpu_timing, "cache_bytes", lambda: CACHE)
    # A host that is busy with other things may take a millisecond for anything.
    monkeypatch.setattr(gpu_timing, "CAPTURED", SHORT)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", found.waited.append)
    return found


def inputs_of(elements: int) -> Inputs:
    x, weight = torch.randn(elements), torch.randn(elements)
    return Inputs((x, 3, weight), leaves=(weight,), gradients=(torch.ones(elements),))


def test_copies_fill_four_caches_and_leaves_stay_arguments() -> None:
    inputs = inputs_of(64)
    copies = gpu_timing.copies(inputs, moved=1000)
    assert len(copies) == 17
    assert copies[0] is inputs
    for copy in copies[1:]:
        x, number, weight = copy.arguments
        assert number == 3
        assert copy.leaves[0] is weight
        assert torch.equal(x, inputs.arguments[0]) and x.data_ptr() != inputs.arguments[0].data_ptr()
        assert copy.gradients[0].data_ptr() != inputs.gradients[0].data_ptr()
    assert len(gpu_timing.copies(inputs, moved=10**9)) == 1
    assert len(gpu_timing.copies(inputs, moved=1)) == gpu_timing.MAX_COPIES


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_short_calls_are_captured_and_long_ones_queued(direction: str, gpu: SimpleNamespace) -> None:
    def short(x: Tensor, number: int, weight: Tensor) -> Tensor:
        return x * number * weight

    def long(x: Tensor, number: int, weight: Tensor) -> Tensor:
        time.sleep(1.2 * SHORT)
        return short(x, number, weight)

    rotated = timing.rotated(inputs_of(64), 4000)
    assert len(rotated) == 5
    before = Graph.replays
    slow = timing.call_on(long, rotated, "both" if direction == "backward" else direction)
    assert isinstance(slow, gpu_timing.Rotation)
    assert slow.seconds() >= SHORT
    assert slow.way == "queued"
    assert slow.host >= SHORT
    quick = timing.call_on(short, rotated, direction)
    assert timing.seconds(quick) >= 0
    assert quick.way == "graph"  # type: ignore[attr-defined]
    assert Graph.replays > before
    assert gpu.waited


def test_what_cannot_be_captured_is_queued(gpu: SimpleNamespace) -> None:
    gpu.captures = RuntimeError("operation not permitted when stream is capturing")
    call = timing.call_on(lambda x, _, weight: x + weight, timing.rotated(inputs_of(8), 4000), "forward")
    assert timing.seconds(call) > 0
    assert call.way == "queued"  # type: ignore[attr-defined]


def test_rows_tell_the_gpus_time_the_hosts_and_the_way() -> None:
    class Fixture:
        stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

        def pedantic(self, target: Any, setup: Any, rounds: int) -> None:
            for _ in range(rounds):
                setup()
                target()
                # The host's time, which says nothing.
                self.stats.stats.data.append(1e9)

    rotated = timing.rotated(inputs_of(8), 4000)
    ours, eager = (timing.call_on(lambda x, _, weight: x + weight, rotated, "forward") for _ in range(2))
    row = timing.compare(Fixture(), ours, {"torch eager": eager}, rounds=3)
    assert row["rounds"] == 3
    assert row["ours"]["max"] < 1
    assert row["ours"]["way"] == row["competitors"]["torch eager"]["way"] == "graph"
    assert row["ours"]["host"] > 0
