from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmkern.training import RunConfig, budget, tokens_for_minutes
from lmkern.training.trainer import Trainer

Make = Callable[..., RunConfig]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that training moves on: 2 s a step of the first stage, 4 s of the second, 10 s a validation."""
    now = SimpleNamespace(seconds=0.0)

    def step(self: Trainer, step: int) -> None:
        now.seconds += 2.0 if self.schedule.span(step).index == 0 else 4.0

    def validate(self: Trainer) -> tuple[float, float]:
        now.seconds += 10.0
        return 1.0, 1.0

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(Trainer, "validate", validate)
    monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def test_tokens_fill_the_minutes(make_config: Make, dataset: Any, clock: SimpleNamespace) -> None:
    # Half the steps take 2 s and half 4 s; a last validation takes 10 s: (100 - 10) / 3 steps.
    assert tokens_for_minutes(make_config(validate_every=0), dataset, 100 / 60) == 30 * 128
    # A validation every 3 steps adds 10 / 3 s to each.
    every = make_config(validate_every=3 * 128)
    assert tokens_for_minutes(every, dataset, 200 / 60) == 30 * 128


def test_too_little_time_still_gives_a_step(make_config: Make, dataset: Any, clock: SimpleNamespace) -> None:
    assert tokens_for_minutes(make_config(), dataset, 0.001) == 128


def test_measuring_does_not_disturb_random_numbers(make_config: Make, dataset: Any) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    tokens = tokens_for_minutes(make_config(), dataset, 1)
    assert tokens > 128
    assert tokens % 128 == 0
    assert torch.equal(torch.rand(2), expected)


def test_no_time_is_refused(make_config: Make, dataset: Any) -> None:
    with pytest.raises(ValueError, match="minutes must be above 0; got 0"):
        tokens_for_minutes(make_config(), dataset, 0)
