"""The file of results of a machine: how a run of some rows joins the rows of runs before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The new record with the rows of the old one that it has not measured again.

    Only if the two are of one commit, without local changes, and one environment; else the new one alone.
    A ceiling is the higher of the two; the shares in a row are those of its own run.
    """
    if not of_one_state(old, new):
        return new

    measured = {key(row): row for row in new["rows"]}
    rows = [measured.pop(key(row), row) for row in old["rows"]] + list(measured.values())
    ceilings = {name: max(value, old["ceilings"].get(name, 0)) for name, value in new["ceilings"].items()}
    return new | {"rows": rows, "ceilings": ceilings}


def of_one_state(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether two records are of one commit, without local changes, and one environment."""
    commit = new["commit"]
    same = all(old.get(key) == new[key] for key in ("format", "commit", "environment"))
    return same and commit.isalnum() and commit != "unknown"


def key(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells a row from all others."""
    return tuple(row[column] for column in ("op", "direction", "shape", "dtype", "backend"))


def best(row: Mapping[str, Any]) -> dict[str, float]:
    """The times of the competitor with the lowest median."""
    return min(row["competitors"].values(), key=lambda times: times["median"])
