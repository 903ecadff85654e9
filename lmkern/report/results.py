"""The rows of an evaluation: as a table, by short keys, and one against another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def result_table(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Header and rows of the table of bits per byte, or of the scores of pairs, as plain text."""
    if "pairs" in evaluation:
        scores = [(row["name"], f"{row['score']:.2f}", row["signature"]) for row in evaluation["rows"]]
        return [("score", "0 to 100", "sacrebleu signature"), *scores]
    cells = [("model", "bits per byte", "perplexity per token")]
    for row in evaluation["rows"]:
        weight = f" (weight of the GPT {row['weight']:.2f})" if row.get("weight") is not None else ""
        perplexity = f"{row['perplexity']:,.1f}" if row.get("perplexity") is not None else "-"
        cells.append((row["name"] + weight, f"{row['bits_per_byte']:.3f}", perplexity))
    return cells


def result_rows(evaluation: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of the evaluation under short keys: gpt, kneser-ney, interpolation, xz, given."""
    found: dict[str, dict[str, Any]] = {}
    for row in evaluation.get("rows", ()):
        name = row["name"].lower()
        keys = ("interpolation", "given", "kneser-ney", "gpt", "xz")
        key = next((key for key in keys if key in name), name)
        found.setdefault(key, row)
    return found


def versus(ours: float, theirs: float) -> str:
    """Ours against theirs in words, to the printed precision."""
    if round(ours, 3) == round(theirs, 3):
        return "level with it"
    return f"{abs(ours / theirs - 1):.1%} {'better' if ours < theirs else 'worse'}"
