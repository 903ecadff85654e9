"""`lmkern tune-kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmkern.cli.options import parse
from lmkern.cli.show import columns


@dataclass(frozen=True, kw_only=True)
class TuneKernels:
    """Search the Triton kernels' tile sizes on this machine's GPU, and keep the faster ones.

    Takes a few minutes. The result is a file that later runs read: tuning.json in the user's cache folder, or
    where LMKERN_TUNING points. What is found is written as it is found: interrupt it and call it again.

    example:
      lmkern tune-kernels
    """

    op: str | None = None
    """Only this op's kernels."""
    again: bool = False
    """Search anew what the file has already."""

    def run(self) -> int:
        """Search and print what changed."""
        from lmkern.jobs.tune import tune
        from lmkern.kernels.tuning import cache_path
        from lmkern.training.progress import ProgressLine

        with ProgressLine() as line:
            found = tune(self.op, again=self.again, progress=line.count)
        rows = [("op", "kernel", "shapes", "constants", "time of the default / theirs")]
        rows += [(*one.key[1:], one.words, f"{one.speedup:.2f}") for one in found]
        print(columns(rows) if found else "nothing is left to search; --again searches anew")
        print(f"\nin {cache_path()}")
        return 0

    def kept(self) -> str:
        """What an interruption leaves."""
        from lmkern.kernels.tuning import cache_path

        return f"what was found is in {cache_path()}, and lmkern tune-kernels goes on from there"


def command(argv: Sequence[str]) -> TuneKernels:
    """The command line as a TuneKernels."""
    return parse(TuneKernels, "tune-kernels", argv)
