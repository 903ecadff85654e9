"""What is printed: tables, and progress on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned lines."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def results(evaluation: Mapping[str, Any]) -> str:
    """The table of bits per byte."""
    rows = [("model", "bits per byte", "perplexity per token")]
    for row in evaluation["rows"]:
        weight = f" (weight of the GPT {row['weight']:.2f})" if row.get("weight") is not None else ""
        perplexity = f"{row['perplexity']:,.1f}" if row.get("perplexity") is not None else "-"
        rows.append((row["name"] + weight, f"{row['bits_per_byte']:.3f}", perplexity))
    return columns(rows)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int | None], None]]:
    """A function of (stage, done, total) that shows one live line on stderr while the inside runs."""
    from lmkern.training.progress import ProgressLine

    line = ProgressLine()

    def show(stage: str, done: int, total: int | None) -> None:
        line.update(f"{stage}: {done:,}" + (f" of {total:,}" if total else ""))

    try:
        yield show
    finally:
        line.close()
