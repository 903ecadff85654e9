import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lmkern.training.metrics import MetricsLog, PhaseClock, rewind_metrics


def steps(path: Path) -> list[tuple[str, int]]:
    return [(event["event"], event["step"]) for event in map(json.loads, path.read_text().splitlines())]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write("step", step=1, loss=math.nan, seconds={"forward": math.inf, "data": 0.5})
        line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {
        "event": "step",
        "step": 1,
        "loss": None,
        "seconds": {"forward": None, "data": 0.5},
    }


def test_rewinding_drops_what_will_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write("stage", step=0)
        for step in (1, 2, 3):
            log.write("step", step=step)
            if step == 2:
                log.write("validation", step=2)
                log.write("end", step=2)
                log.write("stage", step=2)
    with path.open("a") as file:
        file.write('{"event": "st')
    rewind_metrics(path, 2)
    assert steps(path) == [("stage", 0), ("step", 1), ("step", 2), ("validation", 2)]
    rewind_metrics(path, 0)
    assert not path.exists()
    rewind_metrics(path, 3)


def test_phases_add_up_and_go_on_from_where_they_were() -> None:
    clock = PhaseClock(torch.device("cpu"), {"forward": 10.0})
    for _ in range(2):
        with clock.phase("forward"):
            pass
    assert clock.seconds["forward"] > 10.0
    assert clock.seconds["backward"] == 0.0


def test_a_full_disk_names_the_file(tmp_path: Path, full_disk: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    with full_disk(1_000), pytest.raises(OSError, match="too large") as refused, MetricsLog(path) as log:
        log.write("step", text="x" * 2_000)
    assert refused.value.filename == str(path)
    assert path.stat().st_size == 1_000
