"""`lmkern evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from lmkern.cli.options import parse
from lmkern.cli.show import columns


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Judge a run's model on unseen text, beside a modified Kneser-Ney 5-gram model and xz.

    Prints the table of bits per byte and writes evaluation.json into the run folder.

    example:
      lmkern evaluate runs/mine
    """

    run_folder: Positional[Path]
    """The folder that `lmkern train` or `lmkern demo` wrote."""
    split: Literal["test", "validation"] = "test"
    """Which part of the text to judge on."""

    def run(self) -> int:
        """Evaluate and print the table."""
        from lmkern.jobs.steps import evaluate_run
        from lmkern.report.results import result_table
        from lmkern.training.progress import ProgressLine

        with ProgressLine() as line:
            evaluation = evaluate_run(self.run_folder, split=self.split, progress=line.count)
        print(columns(result_table(evaluation)))
        return 0

    def kept(self) -> str:
        """What an interruption leaves."""
        return f"{self.run_folder} is as it was"


def command(argv: Sequence[str]) -> Evaluate:
    """The command line as an Evaluate."""
    return parse(Evaluate, "evaluate", argv)
