"""`lmkern report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from lmkern.cli.options import parse


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write the page of a run: report.html, one file that loads nothing, and the same as report.md.

    example:
      lmkern report runs/mine
    """

    run_folder: Positional[Path]
    """The folder that `lmkern train` or `lmkern demo` wrote."""

    def run(self) -> int:
        """Write the page and print where it is."""
        from lmkern.report import write_report

        print(write_report(self.run_folder))
        return 0

    def kept(self) -> str:
        """What an interruption leaves."""
        return "the report is as it was"


def command(argv: Sequence[str]) -> Report:
    """The command line as a Report."""
    return parse(Report, "report", argv)
