"""Options and fixtures of the benchmarks, and the record of a run: benchmarks/results/<machine>.json.

    python -m pytest benchmarks -p no:logging --benchmark-enable --record
    python -m pytest benchmarks -p no:logging --benchmark-enable --quick

The first runs the tests of the kernels and then every row. Each row is recorded as it comes, beside those on
file if they are of the same commit and environment; else the file is written anew. So a run may be stopped
and goes on: what is on file is timed again only with `--again`. `-k attention` times a part. The second asks
only whether the benchmarks run. (`-p no:logging`: torch.compile logs much that pytest would otherwise keep.)

A product that torch has no instructions for, as of bfloat16 with AVX2, takes torch minutes: rows where one
call would take longer than a minute are left out.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_timing, machine, timing
from benchmarks.contest import COMPILED, DIRECTIONS, EAGER, FORMAT, Compete, Contest, Inputs, dtype_name
from benchmarks.record import joined, key, of_one_state
from lmkern.files import write_text
from lmkern.kernels import backends
from lmkern.memory import keep_freed_memory

RESULTS = Path(__file__).parent / "results"
# The tests that a number may not be reported without.
GATE = ("tests/kernels", "tests/ops")

# Seconds that a call of torch's may take, by the speed of its product.
LONGEST_CALL = 60.0

# Elsewhere a warning is an error. torch.compile uses parts of torch that torch deprecates, and to
# pytest-benchmark a skipped row is worth a warning.
EXPECTED_WARNINGS = (
    "ignore::DeprecationWarning:torch",
    "ignore:Benchmark fixture was not used:pytest_benchmark.logger.PytestBenchmarkWarning",
)

rows_key = pytest.StashKey[list[dict[str, Any]]]()
ceilings_key = pytest.StashKey[dict[str, float]]()
commit_key = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lmkern benchmarks")
    group.addoption(
        "--quick", action="store_true", help="tiny shapes and three rounds: do the benchmarks run?"
    )
    group.addoption(
        "--tested",
        metavar="TESTS",
        nargs="?",
        const=" ".join(GATE),
        help="with --record: these tests have passed at this commit (in CI, say) and are not run again",
    )
    group.addoption(
        "--again", action="store_true", help="with --record: rows that are on file are timed once more"
    )
    group.addoption(
        "--record",
        metavar="FOLDER",
        nargs="?",
        const=str(RESULTS),
        help="run the kernels' tests first and write FOLDER/<machine>.json (default benchmarks/results)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[rows_key] = []
    for line in EXPECTED_WARNINGS:
        config.addinivalue_line("filterwarnings", line)
    if config.getoption("quick") and config.getoption("record"):
        raise pytest.UsageError("--quick gives no numbers to --record; give one of the two")
    if config.getoption("record") and (reason := machine.one_sided_limit()):
        raise pytest.UsageError(f"--record: {reason}")


def pytest_sessionstart(session: pytest.Session) -> None:
    if not session.config.getoption("record"):
        return
    # Taken before the first row: the files may change while the benchmarks run.
    session.config.stash[commit_key] = machine.commit()
    if session.config.getoption("tested"):
        return
    command = [sys.executable, "-m", "pytest", "-q", *GATE]
    if subprocess.run(command, cwd=machine.ROOT).returncode != 0:
        pytest.exit(f"benchmarks: {' '.join(GATE)} did not pass, so nothing is timed; make them green", 1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case, direction and dtype of the file, on every backend of its op that can run here."""
    if "case" not in metafunc.fixturenames:
        return
    module = metafunc.module
    if metafunc.config.getoption("quick"):
        cases = module.QUICK_CASES
    else:
        cases = getattr(module, "GPU_CASES", module.CASES) if gpu_timing.used() else module.CASES
    rows = [
        (case, direction, dtype)
        for direction in DIRECTIONS
        for case in cases
        if direction in case.directions
        for dtype in case.dtypes
    ]
    names = [f"{direction}-{case}-{dtype_name(dtype)}" for case, direction, dtype in rows]
    metafunc.parametrize(("case", "direction", "dtype"), rows, ids=names)
    supports = [row for row in backends.describe() if row.op == module.OP and row.backend != "reference"]
    metafunc.parametrize("backend", [backend_parameter(row) for row in supports])


def backend_parameter(support: backends.Support) -> Any:
    """A backend's name, with the reason to skip its rows where it gives no number worth reading."""
    reason = "" if support.usable else support.reason
    if support.backend == "triton" and not torch.cuda.is_available():
        reason = "triton runs on a CPU only in its interpreter, which is no speed to report"
    return pytest.param(support.backend, marks=pytest.mark.skipif(bool(reason), reason=reason))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Rows with kept memory last: what they ask of the allocator holds for the rest of the process."""
    known = on_file(config) if config.getoption("record") and not config.getoption("again") else set()
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=timing.clock))
        if known and key(named(item)) in known:
            item.add_marker(pytest.mark.skip(reason="on file, of this commit and environment"))
    items.sort(key=keeps_memory)


def keeps_memory(item: pytest.Item) -> bool:
    parameters = getattr(item, "callspec", None)
    return parameters is not None and getattr(parameters.params.get("case"), "kept_memory", False)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return machine.choose_device()


@pytest.fixture(scope="session")
def products(device: torch.device) -> dict[str, float]:
    """FLOP/s of torch's matrix product by dtype, measured once in this run."""
    return machine.measure_products(device)


@pytest.fixture(scope="session")
def ceilings(
    request: pytest.FixtureRequest, device: torch.device, products: dict[str, float]
) -> dict[str, float]:
    """The ceilings of this machine, measured once in this run."""
    return request.config.stash.setdefault(ceilings_key, machine.ceilings(device, products))


@pytest.fixture
def compete(
    request: pytest.FixtureRequest, benchmark: Any, products: dict[str, float], ceilings: dict[str, float]
) -> Compete:
    """compete(contest): time one row, check it against torch and keep it."""
    name, case = named(request.node), request.node.callspec.params["case"]
    direction, dtype = name["direction"], name["dtype"]
    if case.kept_memory:
        keep_freed_memory()

    def run(contest: Contest) -> None:
        work, beside, peaks = contest.work, contest.baseline, {}
        if work.bound == "matmul" and (expected := work.flops / products[dtype]) > LONGEST_CALL:
            pytest.skip(f"a call of torch's would take {expected:.0f} s")
        inputs = timing.rotated(contest.inputs, work.bytes)
        benchmark.group = f"{name['op']} {direction}"
        rounds = 3 if request.config.getoption("quick") else 0
        with contest.within, timing.kept_graphs(), gpu_timing.stream():
            ours = checked(contest, inputs, direction)
            others = competitors(contest, inputs, direction)
            more = {}
            if beside is not None:
                more[beside[0]] = timing.call_on(
                    contest.ours, timing.rotated(beside[1], work.bytes), direction
                )
            times = timing.compare(benchmark, ours, others | more, rounds=rounds)
            if case.peak_memory and times:
                peaks = {who: timing.peak_bytes(call) for who, call in ({"ours": ours} | others).items()}
        if not times:
            return
        row: dict[str, Any] = name | asdict(work) | {"main": case.main}
        row |= {"eager": contest.eager} | times
        if beside is not None:
            row["baseline"] = {"name": beside[0]} | times["competitors"].pop(beside[0])
        if peaks:
            row["peak_bytes"] = peaks
        median = times["ours"]["median"]
        row["share_of_matmul"] = work.flops / median / ceilings[dtype]
        row["share_of_copy"] = work.bytes / median / ceilings["copy"]
        benchmark.extra_info.update(row, machine=machine.environment(), ceilings=ceilings)
        request.config.stash[rows_key].append(row)
        if request.config.getoption("record"):
            record(request.config)

    return run


def named(item: Any) -> dict[str, str]:
    """What tells a row from all others."""
    parameters = item.callspec.params
    return {
        "op": item.module.OP,
        "direction": parameters["direction"],
        "shape": str(parameters["case"]),
        "dtype": dtype_name(parameters["dtype"]),
        "backend": parameters["backend"],
    }


def checked(contest: Contest, inputs: list[Inputs], direction: str) -> timing.Call:
    """The call of ours, once its results are known to be torch's."""
    try:
        ours = timing.call_on(contest.ours, inputs, direction)
        results = ours()
    except backends.UnsupportedBackend as error:
        pytest.skip(str(error))
    reference = contest.reference or contest.competitors[EAGER]
    timing.check_agreement(results, timing.call_of(reference, contest.inputs, direction)())
    return ours


def competitors(contest: Contest, inputs: list[Inputs], direction: str) -> dict[str, timing.Call]:
    functions = dict(contest.competitors)
    if contest.compiles:
        functions[COMPILED] = timing.compiled(functions[EAGER])
    calls = {name: timing.call_on(function, inputs, direction) for name, function in functions.items()}
    return {name: call for name, call in calls.items() if name == EAGER or runs(name, call)}


def runs(name: str, call: timing.Call) -> bool:
    """Whether a competitor can take the row; torch.compile cannot take all, nor has every GPU the memory."""
    try:
        timing.seconds(call)
    except RuntimeError as error:
        print(f"benchmarks: the row is timed without {name}: {error}")
        return False
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Each row's ratios, above 1 where ours is faster; pytest-benchmark's own table has ours alone."""
    if not (rows := config.stash[rows_key]):
        return
    terminalreporter.section("time of torch / time of ours, median over the rounds")
    for row in rows:
        ratios = ", ".join(f"{name} {theirs['ratio']:.2f}" for name, theirs in row["competitors"].items())
        title = f"{row['op']} {row['direction']} {row['shape']} {row['dtype']} {row['backend']}"
        terminalreporter.write_line(f"{title:68} {row['ours']['median'] * 1e3:9.3f} ms   {ratios}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("record"):
        print(f"\nbenchmarks: {len(session.config.stash[rows_key])} rows recorded as they came")


def record(config: pytest.Config) -> None:
    """Writes the rows so far, joined to those on file."""
    rows, path = config.stash[rows_key], record_path(config)
    new = {
        "format": FORMAT,
        "machine": path.stem,
        "tests": "passed",
        "gate": config.getoption("tested") or " ".join(GATE),
        "commit": config.stash[commit_key],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "environment": machine.environment(),
        "gaps": machine.gaps(),
        "ceilings": config.stash[ceilings_key],
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        new = joined(json.loads(path.read_text(encoding="utf-8")), new)
    write_text(path, json.dumps(new, indent=1) + "\n")


def record_path(config: pytest.Config) -> Path:
    return Path(config.getoption("record")) / f"{machine.machine_name(machine.choose_device())}.json"


def on_file(config: pytest.Config) -> set[tuple[str, ...]]:
    """The rows of this commit and environment that are recorded already."""
    path = record_path(config)
    if not path.exists():
        return set()
    old = json.loads(path.read_text(encoding="utf-8"))
    now = {"format": FORMAT, "commit": config.stash[commit_key], "environment": machine.environment()}
    return {key(row) for row in old["rows"]} if of_one_state(old, now) else set()
