"""report.html and report.md of a run folder."""

from __future__ import annotations

from pathlib import Path

from lmkern.files import replacing
from lmkern.report.html import page
from lmkern.report.pictures import curves, stage_boundaries
from lmkern.report.run import Run, read_run
from lmkern.report.sections import report, title
from lmkern.training.run_folder import CURVES, PAGE, PAGE_MARKDOWN


def write_report(folder: str | Path) -> Path:
    """Write report.html (one file that loads nothing) and report.md with its picture into the run folder.

    Both come from the same Markdown and show what the folder holds; a missing piece is named there.
    The old ones stay until the new are whole.
    Returns the path of report.html. Raises FileNotFoundError where the folder is not a run.
    """
    run = read_run(folder)
    markdown, pictures = report(run), draw(run)
    files = {**pictures, PAGE_MARKDOWN: markdown, PAGE: page(markdown, title=title(run), pictures=pictures)}
    with replacing(*(run.folder / name for name in files)) as parts:
        for part, content in zip(parts, files.values(), strict=True):
            part.write_text(content, encoding="utf-8", errors="backslashreplace")
    return run.folder / PAGE


def draw(run: Run) -> dict[str, str]:
    """The run's pictures by file name, as SVG; none before the first step."""
    steps = run.events("step")
    if not steps:
        return {}
    names = [
        f"{stage['unit']}, {stage['context']}" for stage in run.config.get("training", {}).get("stages", ())
    ]
    return {CURVES: curves(steps, run.events("validation"), stage_boundaries(steps, names))}
