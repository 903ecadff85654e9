"""What is printed: tables, and texts of models."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned lines."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def text_streams() -> None:
    """What a model reads and writes is UTF-8, whatever the locale, whose encoding could not say all of it.

    A byte order mark at the beginning is none of it. Bytes that are no UTF-8 are left to the model's refusal,
    which names the text.
    """
    for stream, encoding, errors in (
        (sys.stdin, "utf-8-sig", "surrogateescape"),
        (sys.stdout, "utf-8", "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=encoding, errors=errors)
