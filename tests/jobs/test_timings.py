"""How long each job took."""

import json
from pathlib import Path

import pytest

from lmkern.jobs.timings import record_time, timed


def test_times_add_up_by_job_and_a_failed_job_is_not_noted(tmp_path: Path) -> None:
    record_time(tmp_path, "train", 12.5)
    with timed(tmp_path, "evaluate"):
        pass
    with pytest.raises(RuntimeError), timed(tmp_path, "generate"):
        raise RuntimeError
    timings = json.loads((tmp_path / "timings.json").read_text())
    assert timings["train"] == 12.5
    assert list(timings) == ["train", "evaluate"]
