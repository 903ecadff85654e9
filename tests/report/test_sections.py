"""What the report says, and what it says where something is missing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmkern.report.run import Run, read_run
from lmkern.report.sections import report, summary

SECTIONS = (
    *("Corpus", "Model", "Training", "Evaluation", "Samples"),
    *("Where the time went", "Versions and machine", "Make it again"),
)


def rated(run: Run, ours: float, theirs: float) -> Run:
    """The run with other bits per byte of the model and the n-grams."""
    rows: list[dict[str, Any]] = [
        {"name": "lmkern GPT", "bits_per_byte": ours},
        {"name": "modified Kneser-Ney 5-gram", "bits_per_byte": theirs},
    ]
    return replace(run, evaluation={**(run.evaluation or {}), "rows": rows})


def test_every_section_is_there_with_its_figures(full_run: Path) -> None:
    page = report(read_run(full_run))
    assert [line[3:] for line in page.splitlines() if line.startswith("## ")] == list(SECTIONS)
    figures = (
        "3.11.7",
        "ab" * 32,
        "32,832",
        "102,400",
        "9,510",
        "| 1 | sentences | 32 | 25% |",
        "2.13.0",
        "60.3%",
    )
    assert [figure for figure in figures if figure not in page] == []
    assert "attention crosses document borders" in page.replace("\n", " ")
    assert "| exact duplicate | 2 | 5 |" in page
    assert "Files skipped because they are not text: `` c.bin|` ``." in page
    assert "Files read as something else than UTF-8: latin-1: `a|b.txt`." in page
    assert "| interpolation (weight of the GPT 0.40) | 1.900 | 30.0 |" in page
    assert "| xz -9e given the training text | **1.540** | - |" in page


def test_fresh_run_says_what_is_missing(fresh_run: Path) -> None:
    page = report(read_run(fresh_run))
    assert [line[3:] for line in page.splitlines() if line.startswith("## ")] == list(SECTIONS)
    for words in (
        "has not been evaluated yet",
        "no model is saved yet",
        "No step has been recorded yet",
        f"`lmkern evaluate {fresh_run}`",
        f"`lmkern generate {fresh_run}`",
        "nothing was timed",
    ):
        assert words in page


def test_run_folder_with_nothing_but_its_marker_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"format": "lmkern-run", "version": 1}))
    page = report(read_run(tmp_path))
    for words in ("data folder `data` is not there", "no `config.toml`", "did not record them"):
        assert words in page


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [(1.8, 2.0, "10.0% better"), (2.4, 2.0, "20.0% worse"), (2.0001, 2.0, "level with it")],
)
def test_summary_is_honest_in_both_directions(full_run: Path, ours: float, theirs: float, words: str) -> None:
    assert f"so the GPT is {words}" in summary(rated(read_run(full_run), ours, theirs))


def test_interrupted_run_is_called_unfinished(full_run: Path) -> None:
    run = read_run(full_run)
    without_end = tuple(event for event in run.metrics if event["event"] != "end")
    assert "not finished" in report(replace(run, metrics=without_end))
