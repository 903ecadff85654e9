"""report.html and report.md of a run folder."""

from __future__ import annotations

from pathlib import Path

from lmkern.report.html import page
from lmkern.report.pictures import curves, stage_boundaries
from lmkern.report.run import Run, read_run
from lmkern.report.sections import CURVES, report, title


def write_report(folder: str | Path) -> Path:
    """Write report.html (one file that loads nothing) and report.md with its picture into the run folder.

    Both come from the same Markdown and show what the folder holds; a missing piece is named there.
    Returns the path of report.html. Raises FileNotFoundError where the folder is not a run.
    """
    run = read_run(folder)
    markdown, pictures = report(run), draw(run)
    for name, svg in pictures.items():
        (run.folder / name).write_text(svg, encoding="utf-8")
    (run.folder / "report.md").write_text(markdown, encoding="utf-8")
    path = run.folder / "report.html"
    path.write_text(page(markdown, title=title(run), pictures=pictures), encoding="utf-8")
    return path


def draw(run: Run) -> dict[str, str]:
    """The run's pictures by file name, as SVG; none before the first step."""
    steps = run.events("step")
    if not steps:
        return {}
    names = [
        f"{stage['unit']}, {stage['context']}" for stage in run.config.get("training", {}).get("stages", ())
    ]
    return {CURVES: curves(steps, run.events("validation"), stage_boundaries(steps, names))}
