"""One live line on a terminal; elsewhere a line every few seconds."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

# Seconds between two updates: on a terminal, and in a log file.
LIVE, LOGGED = 0.1, 5.0


class ProgressLine:
    """Shows the latest state of a run in one line that is written over; `say` leaves a line that stays.

    A stream that takes no more, as that of a terminal that was closed, ends the showing and not the run.
    """

    def __init__(self, enabled: bool = True, stream: TextIO | None = None) -> None:
        self.enabled = enabled
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self._shown = -float("inf")
        self._open = False

    def update(self, text: str, *, force: bool = False) -> None:
        """Show text, unless the last update was a moment ago."""
        now = time.monotonic()
        if not self.enabled or (not force and now - self._shown < (LIVE if self.live else LOGGED)):
            return
        self._shown = now
        # \x1b[K clears what a longer line left behind.
        self._write(f"\r{text}\x1b[K" if self.live else f"{text}\n")
        self._open = self.live

    def count(self, stage: str, done: int, total: int | None) -> None:
        """Show how far a stage of some job has come; total: None where it is not known."""
        self.update(f"{stage}: {done:,}" + (f" of {total:,}" if total else ""))

    def say(self, text: str) -> None:
        """Write a line that stays."""
        if self.enabled:
            self.close()
            self._write(f"{text}\n")

    def close(self) -> None:
        """End the live line, so that what is printed next starts on its own."""
        if self._open:
            self._write("\n")
            self._open = False

    def _write(self, text: str) -> None:
        if not self.enabled:
            return
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            self.enabled = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Smoothed:
    """An exponential mean, corrected for its start, for showing only: nothing of the run depends on it."""

    def __init__(self, memory: float = 0.95) -> None:
        self.memory = memory
        self._sum = self._weight = 0.0

    def add(self, value: float) -> float:
        """Take a value in and return the mean."""
        self._sum = self.memory * self._sum + (1 - self.memory) * value
        self._weight = self.memory * self._weight + (1 - self.memory)
        return self._sum / self._weight


def readable_seconds(seconds: float) -> str:
    """75 -> "1:15", 4000 -> "1:06:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def readable_count(count: float) -> str:
    """950 -> "950", 12345 -> "12.3k", 4.2e6 -> "4.2M"."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return f"{count:.0f}"
