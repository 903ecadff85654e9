"""The page of a run, made of what its folder holds and nothing else."""

from lmkern.report.run import Run, read_run
from lmkern.report.write import write_report

__all__ = ["Run", "read_run", "write_report"]
