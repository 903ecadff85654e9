import math

import pytest

from lmkern.training import Stage, TrainingConfig
from lmkern.training.schedule import Schedule


def schedule(steps: int = 100, **fields: object) -> Schedule:
    return Schedule(TrainingConfig(tokens=steps * 256, batch_tokens=256, **fields))  # type: ignore[arg-type]


def test_stages_cover_every_step_once_in_their_shares() -> None:
    thirds = (Stage("sentences", 64, 1 / 3), Stage("paragraphs", 128, 1 / 3), Stage("documents", 256, 1 / 3))
    plan = schedule(100, stages=thirds)
    assert [(span.first, span.end) for span in plan.spans] == [(0, 33), (33, 67), (67, 100)]
    assert [plan.span(step).index for step in (0, 32, 33, 66, 67, 99)] == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match=r"0 \.\. 99; got 100"):
        plan.span(100)


def test_stage_too_small_for_a_step_is_passed_over() -> None:
    plan = schedule(2, stages=(Stage("sentences", 64, 0.01), Stage("documents", 256, 0.99)))
    assert [plan.span(step).stage.unit for step in range(2)] == ["documents", "documents"]


def test_run_takes_whole_steps_and_at_least_one() -> None:
    assert Schedule(TrainingConfig(tokens=1000, batch_tokens=256)).steps == 3
    assert Schedule(TrainingConfig(tokens=1, batch_tokens=256)).steps == 1


def test_learning_rate_rises_linearly_then_falls_along_a_cosine() -> None:
    plan = schedule(100, learning_rate=2.0, warmup=0.1, final_learning_rate=0.25)
    rates = [plan.learning_rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([2.0 * (step + 0.5) / 10 for step in range(10)])
    for step in (10, 40, 99):
        done = (step + 0.5 - 10) / 90
        assert rates[step] == pytest.approx(2.0 * (0.25 + 0.75 * (1 + math.cos(math.pi * done)) / 2))
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert min(rates[10:]) > 0.5


def test_learning_rate_without_warmup_or_floor_is_never_zero() -> None:
    plan = schedule(3, warmup=0.0, final_learning_rate=0.0)
    assert all(plan.learning_rate(step) > 0 for step in range(3))


def test_all_warmup_ends_below_the_peak() -> None:
    plan = schedule(4, learning_rate=1.0, warmup=1.0)
    assert [plan.learning_rate(step) for step in range(4)] == pytest.approx([0.125, 0.375, 0.625, 0.875])


def test_validations_and_checkpoints_come_as_multiples_of_tokens_are_passed() -> None:
    plan = schedule(10, validate_every=600, checkpoint_every=256 * 5)
    # 600, 1200, 1800 and 2400 tokens lie in steps 3, 5, 8 and 10 of 256 tokens.
    assert [n for n in range(1, 11) if plan.validation_due(n)] == [3, 5, 8, 10]
    assert [n for n in range(1, 11) if plan.checkpoint_due(n)] == [5]


def test_zero_means_only_at_the_end() -> None:
    plan = schedule(10, validate_every=0, checkpoint_every=0)
    assert [n for n in range(1, 11) if plan.validation_due(n)] == [10]
    assert not any(plan.checkpoint_due(n) for n in range(1, 11))
