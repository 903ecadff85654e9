"""What a run writes down while it goes: metrics.jsonl, and seconds by phase."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from lmkern.ceiling import synchronize
from lmkern.files import flush_to_disk, known_as, write_text
from lmkern.training.run_folder import PHASES


class PhaseClock:
    """Wall seconds by phase. On a GPU each phase ends when the device has finished it."""

    def __init__(self, device: torch.device, seconds: Mapping[str, float] | None = None) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0) | dict(seconds or {})

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to the phase of that name."""
        start = time.perf_counter()
        try:
            yield
            synchronize(self.device)
        finally:
            self.seconds[name] += time.perf_counter() - start


class MetricsLog:
    """Appends events to a JSON-lines file; a number that is not finite is written as null."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, event: str, **values: Any) -> None:
        """One line; a reader sees it at once."""
        line = json.dumps({"event": event, **_finite(values)}, allow_nan=False) + "\n"
        with known_as({self.path: self.path}):
            self._file.write(line)
            self._file.flush()

    def flush_to_disk(self) -> None:
        """Wait until every line is on the disk: before a checkpoint that counts on them."""
        flush_to_disk(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What a full disk did not take is tried once more.
        with known_as({self.path: self.path}):
            self._file.close()


def rewind_metrics(path: Path, step: int) -> None:
    """Drop the events that a run resumed after `step` finished steps will write again, and any "end".

    A stage event announces the step that follows it, so one at `step` is dropped too, and so is a line cut
    short by a kill. From step 0 everything is written again.
    """
    if not path.exists():
        return
    if step == 0:
        path.unlink()
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            break
        limit = step - 1 if event["event"] == "stage" else step
        if event["event"] != "end" and event["step"] <= limit:
            kept.append(line + "\n")
    write_text(path, "".join(kept))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
