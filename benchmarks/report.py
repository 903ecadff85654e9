"""Pages from results: `python -m benchmarks.report`.

Reads benchmarks/results/*.json and writes docs/benchmarks/<machine>.md with two pictures each (none without
matplotlib), and the table between the markers in README.md. Every row that was measured is shown. Results
whose tests were not green are refused.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.contest import COMPILED, EAGER, FORMAT
from benchmarks.record import best

ROOT = Path(__file__).parents[1]
START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"

METHOD = """\
Ours and torch run in turn within one run. Times are medians over the rounds. The ratio is the median over
the rounds of the time of the best competitor / our time, beside its range: above 1, ours is faster. Forward
is timed without gradients, backward alone, "both" one after the other. The ceiling of a row in GFLOP/s is a
matrix product in its dtype, that of a row in GB/s a copy, both measured in this run; what fits in a cache may
pass the copy."""
CPU_METHOD = """\
In rows of "kept-memory" the process keeps freed memory, as `lmkern train` does; in all others large results
get fresh pages from the system, whose page faults count."""
GPU_METHOD = """\
A time is the GPU's, by events, on inputs that take turns so that four times the L2 cache is moved before one
comes round; calls under 100 microseconds are replayed from a CUDA graph. "host" is what the host takes to
queue a call in eager mode."""

Record = dict[str, Any]
Row = dict[str, Any]


class RefusedResults(ValueError):
    """Results that may not be reported; the message gives the reason and the remedy."""


def load(path: Path) -> Record:
    """One file of results. RefusedResults unless it is whole and its tests passed."""
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RefusedResults(f"report: {path} is not JSON ({error}); run make bench again") from error
    if record.get("format") != FORMAT:
        raise RefusedResults(
            f"report: {path} must have format {FORMAT}; got {record.get('format')!r}; run make bench again"
        )
    if record.get("tests") != "passed":
        raise RefusedResults(
            f"report: {path} must have tests 'passed'; got {record.get('tests')!r}: "
            "no speed is reported for kernels whose tests are red; make them green and run make bench again"
        )
    if not record.get("rows"):
        raise RefusedResults(f"report: {path} must have rows; got none; run make bench again")
    return record


def rate(row: Row) -> str:
    """GFLOP/s of an op that matrix products bound, GB/s of one that memory bounds."""
    done, unit = (row["flops"], "GFLOP/s") if row["bound"] == "matmul" else (row["bytes"], "GB/s")
    return f"{done / row['ours']['median'] / 1e9:.3g} {unit}"


def milliseconds(seconds: float) -> str:
    """Three digits: 0.0312, 1.25, 134."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def cells(row: Row) -> dict[str, str]:
    """A row of a table, by column."""
    times = {name: milliseconds(theirs["median"]) for name, theirs in row["competitors"].items()}
    others = [name for name in times if name not in (EAGER, COMPILED)]
    theirs = best(row)
    host = row["ours"].get("host")
    return {
        "op": row["op"],
        "pass": row["direction"],
        "shape": row["shape"],
        "dtype": row["dtype"],
        "backend": row["backend"],
        "ours, ms": milliseconds(row["ours"]["median"]),
        **{f"{name}, ms": times.get(name, "-") for name in (EAGER, COMPILED)},
        "others, ms": ", ".join(f"{name} {times[name]}" for name in others) or "-",
        "ratio": f"{theirs['ratio']:.2f}",
        "range": f"{theirs['ratio_min']:.2f} to {theirs['ratio_max']:.2f}",
        "host, us": "-" if host is None else f"{host * 1e6:.0f}",
        "rate": rate(row),
        "of ceiling": f"{row['share_of_' + row['bound']]:.0%}",
    }


def row_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, numbers set to the right."""
    filled = [cells(row) for row in rows]
    absent = [name for name in ("others, ms", "host, us") if all(line[name] == "-" for line in filled)]
    lines = [{name: cell for name, cell in line.items() if name not in absent} for line in filled]
    words = {"op", "pass", "shape", "dtype", "backend"}
    return table(
        list(lines[0]), [list(line.values()) for line in lines], [name in words for name in lines[0]]
    )


def baseline_table(rows: Sequence[Row]) -> str:
    """Ours beside ours on other inputs of the same shape: above 1, faster than there."""
    header = ("op", "pass", "shape", "dtype", "beside ours on", "ratio", "range")
    lines = []
    for row in rows:
        beside = row["baseline"]
        name = (row["op"], row["direction"], row["shape"], row["dtype"], beside["name"])
        lines.append(
            (*name, f"{beside['ratio']:.2f}", f"{beside['ratio_min']:.2f} to {beside['ratio_max']:.2f}")
        )
    return table(header, lines, [place < 5 for place in range(len(header))])


def peak_table(rows: Sequence[Row]) -> str:
    """Memory that a call takes at its highest point."""
    names = list(dict.fromkeys(name for row in rows for name in row["peak_bytes"]))
    header = ("op", "pass", "shape", "dtype", *(f"{name}, MiB" for name in names))
    lines = []
    for row in rows:
        peaks = (row["peak_bytes"].get(name) for name in names)
        name = (row["op"], row["direction"], row["shape"], row["dtype"])
        lines.append((*name, *("-" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks)))
    return table(header, lines, [place < 4 for place in range(len(header))])


def table(header: Sequence[str], lines: Sequence[Sequence[str]], left: Sequence[bool]) -> str:
    """A Markdown table; left: whether a column is set to the left."""
    rule = ["---" if words else "---:" for words in left]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def page(record: Record) -> str:
    """docs/benchmarks/<machine>.md."""
    name, rows, ceilings = record["machine"], by_op(record["rows"]), record["ceilings"]
    eager = Counter(row["eager"] for row in rows)
    products = {f"matrix product, {dtype}": f"{ceilings[dtype] / 1e9:.0f} GFLOP/s" for dtype in dtypes(rows)}
    copy = {"copy, bytes read and written": f"{ceilings['copy'] / 1e9:.1f} GB/s"}
    facts = record["environment"] | products | copy
    parts = [
        f"# Benchmarks: {name}",
        "Written by `make report`; do not edit. "
        f"Measured on {record['date']} at commit {record['commit']}, after {record['gate']} had passed.",
        f"{METHOD}\n{GPU_METHOD if on_gpu(record) else CPU_METHOD}{held(record['environment'])}",
        f"Torch eager is {', '.join(f'{kernel} in {count} rows' for kernel, count in eager.items())}.",
        f"Ours is {verdict(rows)}.",
        row_table(rows),
    ]
    if pictures() is not None:
        parts += [
            f"![Ratio of each row]({name}-ratios.svg)",
            f"![Rate over arithmetic intensity, under the ceilings]({name}-roofline.svg)",
        ]
    if beside := [row for row in rows if "baseline" in row]:
        parts += ["## Ours on other inputs", baseline_table(beside)]
    if peaks := [row for row in rows if "peak_bytes" in row]:
        parts += ["## Peak memory of a call", peak_table(peaks)]
    parts += ["## Machine", table(("what", "value"), list(facts.items()), (True, True))]
    if record["gaps"]:
        gaps = "\n".join(f"* {backend}: {reason}" for backend, reason in record["gaps"].items())
        parts += ["Backends without rows here:", gaps]
    return "\n\n".join(parts) + "\n"


def held(environment: dict[str, str]) -> str:
    """What the two sides were held to, where they were, on a line of its own."""
    if (limits := environment.get("torch held to")) is None:
        return ""
    return f"\nOurs is held to the instruction set {environment['CPU module used']}, torch by {limits}."


@cache
def pictures() -> ModuleType | None:
    """benchmarks/pictures.py; None where matplotlib, or what else a report of ours needs, is missing."""
    try:
        return importlib.import_module("benchmarks.pictures")
    except ModuleNotFoundError:
        return None


def on_gpu(record: Record) -> bool:
    return "way" in record["rows"][0]["ours"]


def by_op(rows: Sequence[Row]) -> list[Row]:
    """The rows of an op together, ops in the order in which they first appear."""
    ops = list(dict.fromkeys(row["op"] for row in rows))
    return sorted(rows, key=lambda row: ops.index(row["op"]))


def dtypes(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["dtype"] for row in rows))


def summary(records: Sequence[Record]) -> str:
    """README.md's tables: the ratio of the main shapes on every machine, processors and GPUs apart."""
    parts = []
    for gpus in (False, True):
        here = [record for record in records if on_gpu(record) is gpus]
        if not here:
            continue
        parts.append(ratio_table(here))
        parts.append("\n".join(f"* {machine_line(record)}" for record in here))
    return "\n\n".join(parts)


def ratio_table(records: Sequence[Record]) -> str:
    """Op, pass and shape by machine: the ratio in each dtype."""
    rows = [row for record in records for row in record["rows"] if row["main"]]
    rows.sort(key=lambda row: row["op"])
    names = dtypes(rows)
    ratios = {
        (record["machine"], row["op"], row["direction"], row["shape"], row["dtype"]): best(row)["ratio"]
        for record in records
        for row in record["rows"]
    }
    lines = []
    for name in dict.fromkeys((row["op"], row["direction"], row["shape"]) for row in rows):
        cells = []
        for record in records:
            found = [ratios.get((record["machine"], *name, dtype)) for dtype in names]
            shown = " / ".join("-" if ratio is None else f"{ratio:.2f}" for ratio in found)
            cells.append(shown if any(found) else "-")
        lines.append((*name, *cells))
    header = ("op", "pass", "shape", *(record["machine"] for record in records))
    said = f"Time of the best competitor / ours, {' / '.join(names)}; above 1, ours is faster."
    return f"{said}\n\n{table(header, lines, [place < 3 for place in range(len(header))])}"


def verdict(rows: Sequence[Row]) -> str:
    """How many rows are won."""
    return f"level or ahead in {sum(best(row)['ratio'] >= 1 for row in rows)} of {len(rows)} rows"


def machine_line(record: Record) -> str:
    """Where all rows of a machine are, and how many of them are won."""
    facts = record["environment"]
    threads = "" if on_gpu(record) else f"{facts['threads']}, "
    return (
        f"[{record['machine']}](docs/benchmarks/{record['machine']}.md): {threads}torch {facts['torch']}, "
        f"{record['date']}, commit {record['commit']}; {verdict(record['rows'])}"
    )


def replace_between(text: str, replacement: str) -> str:
    """text with what stands between the markers replaced. ValueError unless each is there once, in order."""
    head, start, rest = text.partition(START)
    _, end, tail = rest.partition(END)
    if not start or not end or START in rest or END in tail:
        raise ValueError(
            f"report: README.md must hold {START} and then {END}, once each; add them where the table goes"
        )
    return f"{head}{START}\n{replacement}\n{END}{tail}"


def write(results: Path, docs: Path, readme: Path) -> list[Path]:
    """All pages and the README's table. Everything is read and checked before anything is written."""
    paths = sorted(results.glob("*.json"))
    if not paths:
        raise FileNotFoundError(f"report: no results in {results}; run make bench first")
    records = [load(path) for path in paths]
    files = {readme: replace_between(readme.read_text(encoding="utf-8"), summary(records))}
    for record in records:
        stem = docs / record["machine"]
        files[stem.with_name(f"{stem.name}.md")] = page(record)
        if (drawn := pictures()) is None:
            continue
        files[stem.with_name(f"{stem.name}-ratios.svg")] = drawn.ratios(by_op(record["rows"]))
        files[stem.with_name(f"{stem.name}-roofline.svg")] = drawn.roofline(
            record["rows"], record["ceilings"]
        )
    docs.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    return list(files)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description="Pages and README table from benchmark results."
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args(arguments)
    try:
        written = write(options.results, options.docs, options.readme)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
