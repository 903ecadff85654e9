"""Options and fixtures of the benchmarks, and the record of a run: benchmarks/results/<machine>.json.

    python -m pytest benchmarks -p no:logging --benchmark-enable --record
    python -m pytest benchmarks -p no:logging --benchmark-enable --quick

The first runs the tests of the kernels and then every row; a run is recorded whole or not at all: the tests
passed before it and every benchmark passed in it. The second asks only whether the benchmarks run.
(`-p no:logging`: torch.compile logs much that pytest would otherwise keep.)
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases, machine, timing
from lmkern.kernels import backends

RESULTS = Path(__file__).parent / "results"
# The tests that a number may not be reported without.
GATE = ("tests/kernels", "tests/ops")

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
        action="store_true",
        help="with --record: the tests have passed at this commit (in CI, say) and are not run again",
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
    quick = metafunc.config.getoption("quick")
    choices = {
        "attention_case": cases.QUICK_ATTENTION if quick else cases.ATTENTION,
        "layer_norm_case": cases.QUICK_LAYER_NORM if quick else cases.LAYER_NORM,
    }
    for name, chosen in choices.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, chosen, ids=str)
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", cases.DTYPES, ids=cases.dtype_name)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return machine.choose_device()


@pytest.fixture(scope="session")
def ceilings(request: pytest.FixtureRequest, device: torch.device) -> dict[str, float]:
    """The two ceilings of this machine, measured once in this run."""
    return request.config.stash.setdefault(ceilings_key, machine.measure_ceilings(device))


@pytest.fixture
def contest(
    request: pytest.FixtureRequest, benchmark: Any, ceilings: dict[str, float]
) -> Callable[..., None]:
    """contest(work, backend, ours, competitors, eager): time one row, check it against eager and keep it.

    work: cases.Work. ours: a call. competitors: calls by name, "torch eager" among them.
    eager: which of torch's kernels "torch eager" is here, in words.
    reference: what to check against instead of eager, where torch's own result is far off.
    """

    def run(
        work: cases.Work,
        backend: str,
        ours: timing.Call,
        competitors: dict[str, timing.Call],
        eager: str,
        reference: timing.Call | None = None,
    ) -> None:
        timing.check_agreement(ours(), (reference or competitors["torch eager"])())
        benchmark.group = f"{work.op} {work.direction}"
        quick = request.config.getoption("quick")
        times = timing.compare(benchmark, ours, competitors, rounds=3 if quick else 0)
        if not times:
            return
        median = times["ours"]["median"]
        row = asdict(work) | {"backend": backend, "eager": eager} | times
        row["share_of_matmul"] = work.flops / median / ceilings[work.dtype]
        row["share_of_copy"] = work.bytes / median / ceilings["copy"]
        benchmark.extra_info.update(row, machine=machine.environment(), ceilings=ceilings)
        request.config.stash[rows_key].append(row)

    return run


@pytest.fixture
def usable(device: torch.device) -> Callable[[str, str, dict[str, torch.Tensor]], None]:
    """usable(op, backend, tensors): skip, with the reason, where the backend cannot take the call."""

    def check(op: str, backend: str, tensors: dict[str, torch.Tensor]) -> None:
        if backend == "triton" and device.type == "cpu":
            pytest.skip("triton runs on a CPU only in its interpreter, which is no speed to report")
        if reason := backends.load(op, backend).unsupported(backends.Call(op, tensors)):
            pytest.skip(f"{op}: backend {backend!r} {reason}")

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Each row's ratios, above 1 where ours is faster; pytest-benchmark's own table has ours alone."""
    if not (rows := config.stash[rows_key]):
        return
    terminalreporter.section("time of torch / time of ours, median over the rounds")
    for row in rows:
        ratios = ", ".join(f"{name} {theirs['ratio']:.2f}" for name, theirs in row["competitors"].items())
        title = f"{row['op']} {row['direction']} {row['shape']} {row['dtype']} {row['backend']}"
        terminalreporter.write_line(f"{title:68} {row['ours']['median'] * 1e3:9.3f} ms   {ratios}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    folder, rows = session.config.getoption("record"), session.config.stash[rows_key]
    if not folder:
        return
    if exitstatus != 0 or not rows:
        print(f"\nbenchmarks: not recorded: exit status {int(exitstatus)}, {len(rows)} rows")
        return
    name = machine.machine_name(machine.choose_device())
    record = {
        "format": cases.FORMAT,
        "machine": name,
        "tests": "passed",
        "gate": " ".join(GATE),
        "commit": session.config.stash[commit_key],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "environment": machine.environment(),
        "gaps": machine.gaps(),
        "ceilings": session.config.stash[ceilings_key],
        "rows": rows,
    }
    path = Path(folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"\nbenchmarks: {len(rows)} rows in {path}")
