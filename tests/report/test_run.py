"""Run folders are read as they are, and damage is named."""

import json
from pathlib import Path

import pytest

from lmkern.report.run import Removed, read_run


def test_missing_folder_and_missing_run_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"nowhere does not exist; expected a folder that `lmkern train`"
    ):
        read_run(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no run\.json"):
        read_run(tmp_path)


def test_other_version_is_refused(fresh_run: Path) -> None:
    about = json.loads((fresh_run / "run.json").read_text())
    (fresh_run / "run.json").write_text(json.dumps({**about, "version": 2}))
    with pytest.raises(
        ValueError, match=r"expected \('lmkern-run', 1\).*read it with the lmkern that wrote it"
    ):
        read_run(fresh_run)


def test_truncated_json_is_named(full_run: Path) -> None:
    path = full_run / "evaluation.json"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match=r"evaluation\.json is not JSON"):
        read_run(full_run)


def test_last_line_cut_by_a_kill_is_left_out_and_a_damaged_line_before_it_is_named(full_run: Path) -> None:
    path = full_run / "metrics.jsonl"
    whole = read_run(full_run).metrics
    path.write_text(path.read_text() + '{"event": "st')
    assert read_run(full_run).metrics == whole
    path.write_text("oops\n" + path.read_text())
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 1 is not JSON"):
        read_run(full_run)


def test_step_that_was_run_twice_counts_once(full_run: Path) -> None:
    again = {"event": "step", "step": 3, "tokens": 3072, "stage": 0, "loss": 1.25}
    with (full_run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    steps = read_run(full_run).events("step")
    assert [step["step"] for step in steps] == list(range(1, 101))
    assert steps[2]["loss"] == 1.25


def test_removals_are_counted_by_reason_in_utf8_bytes(fresh_run: Path) -> None:
    assert read_run(fresh_run).removed == {
        "exact duplicate": Removed(2, 5, ("a", "b")),
        "not text": Removed(1, 4096, ("c.bin|`",)),
    }


def test_parameters_are_counted_from_the_saved_weights(full_run: Path) -> None:
    assert read_run(full_run).parameters == 512 * 64 + 64


def test_data_outside_the_run_is_found(fresh_run: Path, tmp_path: Path) -> None:
    (fresh_run / "data").rename(tmp_path / "elsewhere")
    about = json.loads((fresh_run / "run.json").read_text())
    (fresh_run / "run.json").write_text(json.dumps({**about, "data": str(tmp_path / "elsewhere")}))
    assert read_run(fresh_run).data == tmp_path / "elsewhere"


def test_first_sources_are_named_and_the_others_counted() -> None:
    assert Removed(2, 0, ("a", "b")).names() == "a, b"
    assert Removed(1203, 0, ("a", "b", "c")).names(str.upper) == "A, B, C and 1,200 more"
