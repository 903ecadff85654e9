"""How benchmarks are timed and what they count as work."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import cases, timing
from lmkern.testing import AttentionShape


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
    assert order == ["eager", "compile", "ours"] * (timing.WARM_UPS + 3)
    assert result["rounds"] == 3
    assert set(result["competitors"]) == {"eager", "compile"}


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


@pytest.mark.parametrize(
    "shape",
    [
        AttentionShape(1, 2, 5, 8, 7, 2, True),
        AttentionShape(1, 2, 7, 8, 5, 2, True),
        AttentionShape(1, 2, 1, 8, 7, 2, True),
        AttentionShape(1, 2, 6, 8, 6, 2, False),
    ],
    ids=str,
)
def test_seen_scores_are_those_of_the_mask(shape: AttentionShape) -> None:
    scores = torch.ones(shape.N_q, shape.N_k)
    seen = scores if shape.diagonal is None else scores.tril(shape.diagonal)
    assert cases.seen_scores(shape) == int(seen.sum())


def test_main_rows_are_one_shape_an_op() -> None:
    assert [case.shape.N_q for case in cases.ATTENTION if case.main] == [1024]
    assert [case.shape.E for case in cases.LAYER_NORM if case.main] == [768]
