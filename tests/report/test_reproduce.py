"""The command that makes a run again."""

import json
from pathlib import Path

from lmkern.report.reproduce import commands, without
from lmkern.report.run import read_run


def test_demo_is_repeated_with_its_budget_written_out_and_into_a_new_folder(fresh_run: Path) -> None:
    assert commands(read_run(fresh_run)) == "lmkern demo 'my poems.txt' --minutes 3 --tokens 102400"


def test_training_is_repeated_from_the_configuration_of_the_run(fresh_run: Path) -> None:
    about = json.loads((fresh_run / "run.json").read_text())
    about["command"] = ["lmkern", "train", "--data", "x", "--out", "y", "--resume"]
    (fresh_run / "run.json").write_text(json.dumps(about))
    expected = (
        f"lmkern train --config {fresh_run}/config.toml --data {fresh_run}/data --out {fresh_run}-again"
    )
    assert commands(read_run(fresh_run)) == expected


def test_options_go_with_their_values() -> None:
    options = ["a", "--out", "b", "--tokens=5", "--tokens-extra", "c"]
    assert without(options, "--out", "--tokens") == ["a", "--tokens-extra", "c"]
