"""The report of benchmarks, from a hand-made file of results."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import report

README = f"# Title\n\nbefore\n\n{report.START}\nold table\n{report.END}\n\nafter\n"


def times(median: float, ratio: float) -> dict[str, float]:
    return {
        **{"median": median, "min": median * 0.9, "max": median * 1.2},
        **{"ratio": ratio, "ratio_min": ratio * 0.9, "ratio_max": ratio * 1.1},
    }


ATTENTION_ROW: dict[str, Any] = {
    **{"op": "attention", "direction": "forward", "shape": "B4-H12-N1024-D64-causal", "dtype": "float32"},
    **{"backend": "cpu", "eager": "SDPA FLASH_ATTENTION", "bound": "matmul", "main": True, "rounds": 7},
    **{"flops": 6_000_000_000, "bytes": 50_000_000, "share_of_matmul": 0.75, "share_of_copy": 0.1},
    "ours": {"median": 0.04, "min": 0.039, "max": 0.05},
    "competitors": {"torch eager": times(0.05, 1.25), "torch.compile": times(0.06, 1.5)},
}
SLOWER_ROW: dict[str, Any] = {
    **{"op": "layer_norm", "direction": "backward", "shape": "R1000-E333", "dtype": "bfloat16"},
    **{"backend": "cpu", "eager": "F.layer_norm", "bound": "copy", "main": False, "rounds": 7},
    **{"flops": 4_000_000, "bytes": 2_000_000, "share_of_matmul": 0.01, "share_of_copy": 0.4},
    "ours": {"median": 0.0002, "min": 0.0002, "max": 0.0003},
    "competitors": {"torch eager": times(0.0003, 1.5), "torch.compile": times(0.0001, 0.5)},
}
RECORD: dict[str, Any] = {
    **{"format": 1, "machine": "some-cpu-avx512", "tests": "passed", "gate": "tests/kernels tests/ops"},
    **{"commit": "abc1234", "date": "2026-01-31"},
    "environment": {"processor": "Some CPU", "threads": "2 of 2 logical processors", "torch": "2.13.0"},
    "gaps": {"attention cuda": "needs a GPU"},
    "ceilings": {"float32": 2e11, "bfloat16": 4e11, "copy": 2.5e10},
    "rows": [ATTENTION_ROW, SLOWER_ROW],
}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Folder of results, folder of pages, README."""
    results = tmp_path / "results"
    results.mkdir()
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    return results, tmp_path / "docs", tmp_path / "README.md"


def save(results: Path, **changes: Any) -> None:
    record = copy.deepcopy(RECORD) | changes
    (results / f"{record['machine']}.json").write_text(json.dumps(record), encoding="utf-8")


def line_of(text: str, *words: str) -> str:
    """The one line of a table that holds the words."""
    (line,) = [
        line for line in text.splitlines() if line.startswith("|") and all(word in line for word in words)
    ]
    return line


def test_page_has_every_row_with_its_numbers(folders: tuple[Path, Path, Path]) -> None:
    results, docs, readme = folders
    save(results)
    report.write(results, docs, readme)
    page = (docs / "some-cpu-avx512.md").read_text(encoding="utf-8")
    line = line_of(page, "attention", "float32")
    assert line.endswith("| 40 | 50 | 60 | 1.25 | 1.12 to 1.38 | 150 GFLOP/s | 75% |")
    # The compiled competitor is the better one: the ratio is to it, and the row stays though ours is slower.
    line = line_of(page, "layer_norm", "bfloat16")
    assert line.endswith("| 0.2 | 0.3 | 0.1 | 0.50 | 0.45 to 0.55 | 10 GB/s | 40% |")
    assert "level or ahead in 1 of 2 rows" in page
    assert "abc1234" in page
    assert "attention cuda: needs a GPU" in page
    assert line_of(page, "matrix product, float32") == "| matrix product, float32 | 200 GFLOP/s |"


def test_page_shows_other_inputs_memory_and_other_competitors_where_measured(
    folders: tuple[Path, Path, Path],
) -> None:
    results, docs, readme = folders
    peaky = ATTENTION_ROW | {
        "baseline": {"name": "ordinary logits"} | times(0.03, 0.8),
        "peak_bytes": {"ours": 3 * 2**20, "torch eager": 40 * 2**20, "torch.compile": None},
        "competitors": ATTENTION_ROW["competitors"] | {"torch in chunks": times(0.09, 2.0)},
    }
    save(results, rows=[peaky, SLOWER_ROW])
    report.write(results, docs, readme)
    page = (docs / "some-cpu-avx512.md").read_text(encoding="utf-8")
    assert line_of(page, "ordinary logits").endswith("| ordinary logits | 0.80 | 0.72 to 0.88 |")
    assert line_of(page, "float32 | 3 | 40 | - |")
    assert "torch in chunks 90" in page


def test_rows_of_an_op_stand_together(folders: tuple[Path, Path, Path]) -> None:
    results, docs, readme = folders
    save(results, rows=[ATTENTION_ROW, SLOWER_ROW, ATTENTION_ROW | {"shape": "B1-H1-N1-D1"}])
    report.write(results, docs, readme)
    page = (docs / "some-cpu-avx512.md").read_text(encoding="utf-8")
    assert page.index("B1-H1-N1-D1") < page.index("R1000-E333")


def test_pictures_that_the_page_shows_are_written(folders: tuple[Path, Path, Path]) -> None:
    results, docs, readme = folders
    save(results)
    written = report.write(results, docs, readme)
    page = (docs / "some-cpu-avx512.md").read_text(encoding="utf-8")
    pictures = [path for path in written if path.suffix == ".svg"]
    assert len(pictures) == 2
    for path in pictures:
        assert f"]({path.name})" in page
        ElementTree.parse(path)


def test_readme_keeps_its_text_and_gets_the_main_rows_only(folders: tuple[Path, Path, Path]) -> None:
    results, docs, readme = folders
    save(results)
    report.write(results, docs, readme)
    first = readme.read_text(encoding="utf-8")
    before, after = README.split("old table")
    assert first.startswith(before)
    assert first.endswith(after)
    assert "old table" not in first
    assert "B4-H12-N1024-D64-causal" in first
    assert "R1000-E333" not in first
    report.write(results, docs, readme)
    assert readme.read_text(encoding="utf-8") == first


def test_readme_sets_machines_side_by_side(folders: tuple[Path, Path, Path]) -> None:
    results, docs, readme = folders
    save(results)
    half = ATTENTION_ROW | {"dtype": "bfloat16", "competitors": {"torch eager": times(0.05, 2.5)}}
    norm = SLOWER_ROW | {"main": True}
    save(results, machine="other-cpu", rows=[half, ATTENTION_ROW, norm])
    on_gpu = ATTENTION_ROW | {"ours": {"median": 0.04, "way": "events"}}
    save(results, machine="some-gpu", rows=[on_gpu])
    report.write(results, docs, readme)
    text = readme.read_text(encoding="utf-8")
    assert "| op | pass | shape | other-cpu | some-cpu-avx512 |" in text
    # The dtypes stand in one cell, and what a machine has not measured is a dash.
    assert "| attention | forward | B4-H12-N1024-D64-causal | 2.50 / 1.25 | - / 1.25 |" in text
    assert "| layer_norm | backward | R1000-E333 | 0.50 / - | 0.50 / - |" in text
    assert "[other-cpu](docs/benchmarks/other-cpu.md)" in text
    assert "level or ahead in 2 of 3 rows" in text
    assert text.index("| op | pass | shape | some-gpu |") > text.index("[some-cpu-avx512]")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tests": "failed"}, "'failed'.*tests are red"),
        ({"tests": None}, "tests 'passed'; got None"),
        ({"format": 99}, "format 1; got 99"),
        ({"rows": []}, "must have rows"),
    ],
    ids=["red tests", "no word of tests", "another format", "no rows"],
)
def test_refused_results_leave_every_page_alone(
    folders: tuple[Path, Path, Path], changes: dict[str, Any], message: str
) -> None:
    results, docs, readme = folders
    save(results, machine="a-good-one")
    save(results, **changes)
    with pytest.raises(report.RefusedResults, match=rf"some-cpu-avx512\.json.*{message}"):
        report.write(results, docs, readme)
    assert not docs.exists()
    assert readme.read_text(encoding="utf-8") == README


@pytest.mark.parametrize(
    "text",
    ["", report.START, f"{report.END}{report.START}", README + README],
    ids=["none", "one", "swapped", "two"],
)
def test_readme_without_its_two_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        report.replace_between(text, "table")


def test_no_results_say_what_to_run(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    results, docs, readme = folders
    arguments = ["--results", str(results), "--docs", str(docs), "--readme", str(readme)]
    assert report.main(arguments) == 1
    assert "run make bench first" in capsys.readouterr().err


def test_page_says_what_both_sides_were_held_to(folders: tuple[Path, Path, Path]) -> None:
    results, docs, readme = folders
    limits = {"CPU module used": "avx2", "torch held to": "ATEN_CPU_CAPABILITY=avx2"}
    save(results, environment=RECORD["environment"] | limits)
    report.write(results, docs, readme)
    page = (docs / "some-cpu-avx512.md").read_text(encoding="utf-8")
    assert "Ours is held to the instruction set avx2, torch by ATEN_CPU_CAPABILITY=avx2." in page
