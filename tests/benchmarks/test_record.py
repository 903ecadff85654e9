"""How the rows of a run join those on file."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.record import joined


def row(op: str, time: float) -> dict[str, Any]:
    name = {"op": op, "direction": "forward", "shape": "R8-E8", "dtype": "float32", "backend": "cpu"}
    return name | {"ours": {"median": time}}


OLD: dict[str, Any] = {
    **{"format": 1, "commit": "abc1234", "environment": {"torch": "2.13.0"}, "date": "2026-01-30"},
    "ceilings": {"float32": 2.0, "copy": 9.0},
    "rows": [row("attention", 1.0), row("layer_norm", 1.0)],
}
NEW: dict[str, Any] = OLD | {
    **{"date": "2026-01-31", "ceilings": {"float32": 3.0, "copy": 8.0}},
    "rows": [row("rms_norm", 2.0), row("attention", 2.0)],
}


def test_rows_measured_again_replace_those_on_file_and_the_others_stay() -> None:
    record = joined(OLD, NEW)
    times = {row["op"]: row["ours"]["median"] for row in record["rows"]}
    assert times == {"attention": 2.0, "layer_norm": 1.0, "rms_norm": 2.0}
    assert record["ceilings"] == {"float32": 3.0, "copy": 9.0}
    assert record["date"] == "2026-01-31"


@pytest.mark.parametrize(
    "changes",
    [{"commit": "def5678"}, {"environment": {"torch": "2.14.0"}}, {"format": 2}],
    ids=["commit", "environment", "format"],
)
def test_rows_of_another_state_are_dropped(changes: dict[str, Any]) -> None:
    assert joined(OLD | changes, NEW) == NEW


@pytest.mark.parametrize("commit", ["abc1234 with local changes", "unknown"])
def test_rows_of_no_commit_are_not_joined(commit: str) -> None:
    new = NEW | {"commit": commit}
    assert joined(OLD | {"commit": commit}, new) == new
