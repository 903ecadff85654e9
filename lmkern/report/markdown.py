"""Pieces of Markdown that show any text literally, and numbers as people read them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# C0 controls (tab and newline apart) as their visible Unicode pictures; C1 and surrogates as U+FFFD.
CONTROL_PICTURES = {
    **{code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
    **dict.fromkeys(range(0xD800, 0xE000), 0xFFFD),
}
BAR_EIGHTHS = " ▏▎▍▌▋▊▉"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """A Markdown table of cells that are Markdown already; columns in `numbers` are aligned to the right."""
    rule = ["---:" if column in numbers else "---" for column in range(len(header))]
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def text(value: object) -> str:
    """Plain text for the middle of a line, with every character escaped that could be markup there."""
    line = " ".join(str(value).split()).translate(CONTROL_PICTURES)
    # More characters would count at the start of a line; `table` escapes the pipe, for every kind of cell.
    return re.sub(r"([\\`*_\[\]<>&~])", r"\\\1", line)


def code(value: object) -> str:
    """One line of text as a code span; the fence outgrows the backticks inside."""
    line = str(value).replace("\n", "⏎").translate(CONTROL_PICTURES)
    if not line:
        return "(empty)"
    fence = "`" * (longest_backtick_run(line) + 1)
    padding = " " if line[0] in "` " or line[-1] in "` " else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def block(value: str, info: str = "text") -> str:
    """Several lines of text as a fenced code block; the fence outgrows the backticks inside."""
    fence = "`" * max(3, longest_backtick_run(value) + 1)
    return f"{fence}{info}\n{visible(value)}\n{fence}"


def visible(value: str) -> str:
    """The text with one kind of line end, and its control characters as visible pictures."""
    return value.replace("\r\n", "\n").translate(CONTROL_PICTURES)


def longest_backtick_run(value: str) -> int:
    """How many backticks stand in a row at most."""
    return max((len(run) for run in re.findall("`+", value)), default=0)


def count(number: float) -> str:
    """A whole number with thousands separated: 1,234,567."""
    return f"{round(number):,}"


def size(n_bytes: float) -> str:
    """Bytes in decimal units: 812 bytes, 2.31 MB."""
    if n_bytes < 1000:
        return f"{round(n_bytes)} bytes"
    for unit, scale in (("kB", 1e3), ("MB", 1e6), ("GB", 1e9)):
        if n_bytes < 1000 * scale:
            return f"{n_bytes / scale:.3g} {unit}"
    return f"{n_bytes / 1e12:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds as 0.42 s, 12.3 s, 2 min 41 s or 3 h 05 min."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def bar(share: float, width: int = 16) -> str:
    """A horizontal bar of block characters, `width` characters long at a share of 1, never quite empty."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    return ("█" * (eighths // 8) + BAR_EIGHTHS[eighths % 8]).strip() or BAR_EIGHTHS[1]
