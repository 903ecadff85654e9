"""Pictures of a run as SVG text, in colours that follow the reader's light or dark scheme."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Each colour has its counterpart under a dark scheme; a viewer without CSS variables shows the light one.
INK, QUIET, LINE, TRAIN, VALIDATION = "#23272e", "#6a7079", "#e3e4e6", "#2b67a8", "#c2571a"
DARK = {INK: "#d9dce0", QUIET: "#969ca6", LINE: "#2f3338", TRAIN: "#7fb2e8", VALIDATION: "#f0a06a"}
# More points than this a curve cannot show at the width of the page.
MAX_POINTS = 800


@dataclass(frozen=True)
class Boundary:
    """Where a stage begins: tokens seen so far, and the stage's name."""

    tokens: int
    name: str


def curves(
    steps: Sequence[dict[str, Any]], validations: Sequence[dict[str, Any]], boundaries: Sequence[Boundary]
) -> str:
    """Loss (train, smoothed, and validation), learning rate and tokens per second over the tokens seen.

    steps and validations are the events of metrics.jsonl, at least one step; a boundary is drawn as a dotted
    line with its name. Returns SVG text, the same for the same input.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "lmkern",
        "font.family": "sans-serif",
        "font.size": 9.5,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.6, 5.4), layout="constrained")
        loss, rate, speed = figure.subplots(3, 1, sharex=True, height_ratios=(4.6, 1, 1))
        unit, scale = token_unit(steps[-1]["tokens"])
        tokens = np.array([event["tokens"] for event in steps]) / scale
        losses = column(steps, "loss")
        draw_loss(loss, tokens, losses, validations, scale)
        rate.plot(*thin(tokens, column(steps, "learning_rate")), color=INK, linewidth=1.1)
        speed.plot(*thin(tokens, smooth(column(steps, "tokens_per_second"))), color=INK, linewidth=1.1)
        speed.set_ylim(bottom=0)
        for axes, title in (
            (loss, "loss, nats per token"),
            (rate, "learning rate"),
            (speed, "tokens per second"),
        ):
            plain(axes, title)
            for boundary in boundaries:
                axes.axvline(boundary.tokens / scale, color=QUIET, linewidth=0.8, linestyle=(0, (1, 2)))
        # Names alternate between two heights, so that two short stages do not overprint each other.
        for index, boundary in enumerate(boundaries):
            loss.annotate(
                boundary.name,
                (boundary.tokens / scale, 1 - 0.075 * (index % 2)),
                xycoords=("data", "axes fraction"),
                xytext=(4, -3),
                textcoords="offset points",
                color=QUIET,
                va="top",
            )
        speed.set_xlabel(f"{unit} of tokens seen" if scale > 1 else "tokens seen", color=QUIET)
        loss.set_xlim(0, tokens[-1] * 1.005)
        speed.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return schemed(buffer.getvalue())


def draw_loss(
    axes: Axes, tokens: np.ndarray, losses: np.ndarray, validations: Sequence[dict[str, Any]], scale: float
) -> None:
    """Raw and smoothed training loss, and validation loss with its best point ringed."""
    axes.plot(*thin(tokens, losses), color=TRAIN, linewidth=0.6, alpha=0.3)
    axes.plot(*thin(tokens, smooth(losses)), color=TRAIN, linewidth=1.6, label="train, smoothed")
    shown = losses[np.isfinite(losses)]
    if validations:
        seen = np.array([event["tokens"] for event in validations]) / scale
        values = column(validations, "loss")
        label = "validation"
        if np.isfinite(values).any():
            best = int(np.nanargmin(np.where(np.isfinite(values), values, np.nan)))
            label += f", best {values[best]:.3f}"
            axes.plot(
                seen[best], values[best], color=VALIDATION, marker="o", markersize=7, markerfacecolor="none"
            )
        axes.plot(seen, values, color=VALIDATION, linewidth=1.3, marker="o", markersize=3, label=label)
        shown = np.concatenate([shown, values[np.isfinite(values)]])
    if shown.size:
        low, high = shown.min(), np.quantile(shown, 0.995)
        axes.set_ylim(low - 0.08 * (high - low) - 1e-3, high + 0.12 * (high - low) + 1e-3)
    axes.legend(frameon=False, labelcolor=INK, loc="upper right", ncols=2, borderaxespad=0.1)


def plain(axes: Axes, title: str) -> None:
    """Quiet axes: a title at the left, faint horizontal lines, no frame."""
    axes.set_title(title, loc="left", fontsize=9.5, color=INK)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.tick_params(colors=QUIET, length=0)


def column(events: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """One field of the events as float64; NaN where an event lacks it (JSON has no NaN: it may be null)."""
    return np.array([np.nan if event.get(name) is None else float(event[name]) for event in events])


def smooth(values: np.ndarray, share: float = 0.02) -> np.ndarray:
    """Mean over a window of `share` of the points around each, so without lag; skips what is not finite."""
    window = np.ones(2 * round(share * len(values) / 2) + 1)
    finite = np.isfinite(values)
    held = np.convolve(finite, window, mode="same")
    total = np.convolve(np.where(finite, values, 0.0), window, mode="same")
    return np.where(held > 0, total / np.maximum(held, 1), np.nan)


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points, evenly taken, the first and the last among them."""
    if len(x) <= MAX_POINTS:
        return x, y
    kept = np.linspace(0, len(x) - 1, MAX_POINTS).round().astype(int)
    return x[kept], y[kept]


def token_unit(tokens: float) -> tuple[str, float]:
    """The unit in which this many tokens read well, and its size."""
    for name, scale in (("billions", 1e9), ("millions", 1e6), ("thousands", 1e3)):
        if tokens >= scale:
            return name, scale
    return "", 1.0


def stage_boundaries(steps: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Boundary]:
    """Where each stage begins, from the steps' stage index; a single stage has none to show."""
    found = [Boundary(0, names[steps[0]["stage"]])] if steps else []
    for before, after in pairwise(steps):
        if after["stage"] != before["stage"]:
            found.append(Boundary(before["tokens"], names[after["stage"]]))
    return found if len(found) > 1 else []


def schemed(svg: str) -> str:
    """The SVG with its colours as variables that change under a dark scheme."""
    names = {colour: f"--c{index}" for index, colour in enumerate(DARK)}
    for colour, name in names.items():
        svg = svg.replace(colour, f"var({name}, {colour})")
    dark = " ".join(f"{names[colour]}: {value};" for colour, value in DARK.items())
    style = f"<style>@media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>"
    head, mark, rest = svg.partition("<defs>")
    return f"{head}{style}\n{mark}{rest}"
