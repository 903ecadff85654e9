"""How long each job on a run took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmkern.files import write_json
from lmkern.report.run import read_json
from lmkern.training.run_folder import TIMINGS


def record_time(folder: Path, job: str, seconds: float) -> None:
    """Note in timings.json how long a job took."""
    timings = read_json(folder / TIMINGS) or {}
    write_json(folder / TIMINGS, {**timings, job: round(seconds, 3)})


@contextmanager
def timed(folder: Path, job: str) -> Iterator[None]:
    """Note in timings.json how long the inside took, unless it failed."""
    start = time.perf_counter()
    yield
    record_time(folder, job, time.perf_counter() - start)
