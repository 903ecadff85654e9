"""The main job's presets, its division of the time, and what it refuses."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import lmkern.jobs.demo as module
from lmkern.data import DataConfig
from lmkern.jobs.demo import demo, preset, reserve, token_budget
from lmkern.training import RunConfig


def dataset(tokens: int, train_bytes: int = 1_000_000) -> Any:
    part = SimpleNamespace(tokens=range(tokens), bytes=train_bytes)
    return cast(Any, SimpleNamespace(train=part, validation=part, test=part))


def test_more_minutes_never_choose_a_smaller_model() -> None:
    widths = [preset(minutes).model.width for minutes in (0.5, 3, 9.9, 10, 20, 600)]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


def test_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match="demo: minutes must be above 0; got 0"):
        preset(0)


def test_reserve_grows_with_the_text_and_shrinks_with_the_speed() -> None:
    assert reserve(dataset(50_000), 1e4) < reserve(dataset(100_000), 1e4)
    assert reserve(dataset(50_000), 1e4) < reserve(dataset(50_000, 3_000_000), 1e4)
    assert reserve(dataset(50_000), 1e4) > reserve(dataset(50_000), 1e5)


def test_budget_and_reserve_together_fill_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = 10_000.0
    monkeypatch.setattr(
        module, "tokens_for_minutes", lambda config, data, minutes: round(rate * minutes * 60)
    )
    data = dataset(10_000)
    tokens = token_budget(RunConfig(), data, seconds=170)
    assert tokens / rate + reserve(data, rate) == pytest.approx(170, abs=1)


def test_time_of_the_measurement_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 50.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(module, "tokens_for_minutes", lambda config, data, minutes: round(6e5 * minutes))
    data = dataset(10_000)
    assert token_budget(RunConfig(), data, seconds=170) == int((120 - reserve(data, 1e4)) * 1e4)


def test_too_little_time_is_an_error_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "tokens_for_minutes", lambda config, data, minutes: 1000)
    with pytest.raises(
        ValueError, match="more than is left: give more --minutes, or the training's budget as"
    ):
        token_budget(RunConfig(), dataset(100_000), seconds=60)


def test_folder_that_holds_something_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="is not empty and a demo trains in a new folder"):
        demo(RunConfig(DataConfig()), tmp_path, minutes=3)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
