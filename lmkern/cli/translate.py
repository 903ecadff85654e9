"""`lmkern translate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from lmkern.cli.options import parse
from lmkern.cli.show import text_streams


@dataclass(frozen=True, kw_only=True)
class Translate:
    """Let a run's model, which has learned from pairs, turn each source into its target.

    Sources are the lines of standard input, or --source; a target is a line on standard output.

    example:
      lmkern translate runs/translator --source "Ein Hund läuft über die Wiese."
      lmkern translate runs/translator < sources.txt > targets.txt
    """

    run_folder: Positional[Path]
    """The folder that `lmkern train` wrote."""
    source: str = ""
    """One source. Default: the lines of standard input."""
    beams: int = 5
    """Prefixes that the search keeps. 1: greedy."""
    length_penalty: float = 1.0
    """0 asks for the likeliest target, more for longer ones."""

    def run(self) -> int:
        """Print the targets."""
        from lmkern.jobs.steps import translate
        from lmkern.training.progress import ProgressLine

        text_streams()
        sources = [self.source] if self.source else sys.stdin.read().split("\n")
        if sources[-1] == "":
            del sources[-1]
        with ProgressLine() as line:
            found = translate(
                self.run_folder,
                sources,
                beams=self.beams,
                length_penalty=self.length_penalty,
                note=line.say,
            )
        for target in found:
            print(" ".join(target.split()))
        return 0

    def kept(self) -> str:
        """What an interruption leaves."""
        return "translation writes no files"


def command(argv: Sequence[str]) -> Translate:
    """The command line as a Translate."""
    return parse(Translate, "translate", argv)
