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

    Prints the table of bits per byte and writes evaluation.json into the run folder. A model of pairs is
    judged by BLEU and chrF of the targets that beam search finds; they are written to outputs.txt.

    example:
      lmkern evaluate runs/mine
      lmkern evaluate runs/translator --split validation --beams 5 --length-penalty 0.6
    """

    run_folder: Positional[Path]
    """The folder that `lmkern train` or `lmkern demo` wrote."""
    split: Literal["test", "validation"] = "test"
    """Which part of the data to judge on."""
    beams: int = 5
    """Pairs: prefixes that the search keeps. 1: greedy."""
    length_penalty: float = 1.0
    """Pairs: 0 asks for the likeliest target, more for longer ones."""

    def run(self) -> int:
        """Evaluate and print the table."""
        from lmkern.jobs.steps import evaluate_run
        from lmkern.report.results import result_table
        from lmkern.training.progress import ProgressLine

        with ProgressLine() as line:
            evaluation = evaluate_run(
                self.run_folder,
                split=self.split,
                beams=self.beams,
                length_penalty=self.length_penalty,
                progress=line.count,
                note=line.say,
            )
        print(columns(result_table(evaluation)))
        return 0

    def kept(self) -> str:
        """What an interruption leaves."""
        return f"{self.run_folder} is as it was"


def command(argv: Sequence[str]) -> Evaluate:
    """The command line as an Evaluate."""
    return parse(Evaluate, "evaluate", argv)
