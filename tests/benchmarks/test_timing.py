"""How benchmarks are timed and what they count as work."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import timing
from benchmarks.contest import Case, Inputs

ROOT = Path(__file__).parents[2]
SIZE = 64 * 2**20


class Fixture:
    """The part of pytest-benchmark's fixture that `compare` uses, with a made-up time for ours."""

    def __init__(self) -> None:
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, target: Any, setup: Any, rounds: int) -> None:
        for _ in range(rounds):
            setup()
            target()
            self.stats.stats.data.append(1.0)


def test_competitors_run_in_turn_with_ours() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in ("eager", "compile")}
    result = timing.compare(Fixture(), lambda: order.append("ours"), calls, rounds=3)
    forwards, backwards = ["eager", "compile", "ours"], ["compile", "eager", "ours"]
    assert order == forwards * (timing.WARM_UPS + 1) + backwards + forwards
    assert result["rounds"] == 3
    assert set(result["competitors"]) == {"eager", "compile"}


def test_long_rounds_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for long_round in (1e9, 0.0):
        monkeypatch.setattr(timing, "LONG_ROUND", long_round)
        monkeypatch.setattr(timing, "BUDGET", 0.0)
        counts.append(timing.compare(Fixture(), lambda: None, {"eager": lambda: None})["rounds"])
    assert counts == [timing.MIN_ROUNDS, timing.LONG_ROUNDS]


def test_ratio_is_the_median_of_the_rounds_ratios() -> None:
    # The machine slows down fourfold in the last round: the ratio of that round is unharmed.
    result = timing.summarise([1.0, 2.0, 4.0], {"eager": [3.0, 4.0, 16.0]})
    assert result["ours"] == {"median": 2.0, "min": 1.0, "max": 4.0}
    assert result["competitors"]["eager"] == {
        **{"median": 4.0, "min": 3.0, "max": 16.0},
        **{"ratio": 3.0, "ratio_min": 2.0, "ratio_max": 4.0},
    }


@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_results_that_differ_are_not_timed(wrong: float) -> None:
    right = torch.ones(8)
    timing.check_agreement((right, right), (right, right + 1e-6))
    with pytest.raises(AssertionError, match="differs from torch"):
        timing.check_agreement((right, right * wrong), (right, right))


def test_calls_of_each_direction_may_repeat() -> None:
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    inputs = Inputs((x, y), leaves=(x, y), gradients=(torch.ones(2), torch.full((2,), 10.0)))

    def function(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * y, x + y

    forward = timing.call_of(function, inputs, "forward")
    assert not any(result.requires_grad for result in forward())
    for direction in ("backward", "both"):
        call = timing.call_of(function, inputs, direction)
        for _ in range(2):
            dx, dy = call()
            assert dx.tolist() == [13.0, 14.0]
            assert dy.tolist() == [11.0, 12.0]


def test_a_case_is_named_by_its_words() -> None:
    assert str(Case("R16-E8")) == "R16-E8"
    assert str(Case("R16-E8", note="peaky", kept_memory=True)) == "R16-E8-peaky-kept-memory"


def test_the_fastest_is_found_and_hopeless_ones_run_once() -> None:
    runs = {"slow": 0, "quick": 0}

    def run(name: str, pause: float) -> None:
        runs[name] += 1
        time.sleep(pause)

    calls = {"slow": lambda: run("slow", 0.05), "quick": lambda: run("quick", 0.001)}
    assert timing.fastest(calls) == "quick"
    assert runs["slow"] == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process's figures from Linux")
def test_peak_memory_is_that_of_the_call() -> None:
    """In a process of its own: one that has kept freed memory gives it out again."""
    code = (
        "import torch; from benchmarks import timing\n"
        f"peak = timing.peak_bytes(lambda: torch.ones({SIZE}, dtype=torch.uint8))\n"
        "print('' if peak is None else peak)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    # Linux counts pages for each thread and adds them up now and then.
    assert not done.stdout.strip() or abs(int(done.stdout) - SIZE) < 4 * 2**20
