"""The two pictures of a page of benchmarks, as SVG text: ratios by row, and the roofline."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks.record import best
from lmkern.report.pictures import INK, LINE, QUIET, TRAIN, VALIDATION, plain, schemed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "lmkern", "font.family": "sans-serif", "font.size": 9.5}
COLOURS = {"float32": TRAIN, "bfloat16": VALIDATION}
# One an op, in the order of the rows; from the start again when they run out.
MARKERS = "osD^v<>pP*XhdH8"
AHEAD, BEHIND = TRAIN, VALIDATION


def ratios(rows: Sequence[Mapping[str, Any]]) -> str:
    """A bar a row: the better competitor's time / ours, logarithmic; its range over the rounds as a line."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 1.0 + 0.21 * len(rows)), layout="constrained")
        axes = figure.subplots()
        plain(axes, "time of the better of eager and compiled torch / time of ours")
        axes.grid(visible=False)
        for place, times in enumerate(map(best, rows)):
            colour = AHEAD if times["ratio"] >= 1 else BEHIND
            axes.plot([1, times["ratio"]], [place, place], color=colour, linewidth=7, solid_capstyle="butt")
            axes.plot([times["ratio_min"], times["ratio_max"]], [place, place], color=INK, linewidth=0.8)
        columns = ("op", "direction", "shape", "dtype", "backend")
        names = [" ".join(row[column] for column in columns) for row in rows]
        axes.set_yticks(range(len(rows)), names, fontsize=7)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.axvline(1, color=QUIET, linewidth=0.8)
        return _svg(figure)


def roofline(rows: Sequence[Mapping[str, Any]], ceilings: Mapping[str, float]) -> str:
    """FLOP/s over FLOP per byte, one point a row, under the copy's slope and each dtype's matrix product."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    # A copy computes nothing, and has no place on these axes.
    rows = [row for row in rows if row["flops"]]
    intensities = np.array([row["flops"] / row["bytes"] for row in rows])
    x = np.geomspace(intensities.min() / 2, intensities.max() * 2, 200)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 4.2), layout="constrained")
        axes = figure.subplots()
        plain(axes, "GFLOP/s over arithmetic intensity; hollow: backward")
        for dtype in dtypes:
            roof = np.minimum(x * ceilings["copy"], ceilings[dtype]) / 1e9
            label = f"{dtype} ceiling"
            axes.plot(x, roof, color=COLOURS.get(dtype, INK), linewidth=1.2, linestyle="--", label=label)
        _points(axes, rows)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(color=LINE, linewidth=0.8)
        axes.set_xlabel("operations per byte", color=QUIET)
        figure.legend(loc="outside right upper", frameon=False, labelcolor=INK, fontsize=8)
        return _svg(figure)


def _points(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Filled for forward, hollow for backward; one legend entry an op."""
    kinds: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for row in rows:
        point = (row["flops"] / row["bytes"], row["flops"] / row["ours"]["median"] / 1e9)
        kinds.setdefault((row["op"], row["direction"], row["dtype"]), []).append(point)
    ops = list(dict.fromkeys(op for op, _, _ in kinds))
    for op, marker in zip(ops, MARKERS, strict=False):
        axes.plot([], [], linestyle="none", marker=marker, markersize=5, color=INK, label=op)
    for (op, direction, dtype), points in kinds.items():
        colour = COLOURS.get(dtype, INK)
        axes.plot(
            *np.array(points).T,
            linestyle="none",
            marker=MARKERS[ops.index(op) % len(MARKERS)],
            markersize=5,
            color=colour,
            markerfacecolor=colour if direction == "forward" else "none",
        )


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return schemed(buffer.getvalue())
