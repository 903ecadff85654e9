"""Builds, tests and times the kernels on the GPU at hand: `make gpu`, or one stage of it.

    python -m benchmarks.gpu                  every stage: build, test, bench, report
    python -m benchmarks.gpu test             one stage; what has passed is not run again
    python -m benchmarks.gpu --dry-run        the plan, which needs no GPU

Needs no network. Every step is a process of its own with a time limit, so that one that hangs costs one row,
and its outcome is written to STATE/steps.json before the next begins: interrupt it and call it again. A stage
stops after --budget seconds, with status 75, and goes on when called again. A change of a source file begins
everything anew. An op whose tests failed on a backend is not timed on it. What could not be built is named,
and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from benchmarks import machine
from benchmarks.contest import DIRECTIONS

ROOT = machine.ROOT
STATE = ROOT / "build" / "gpu"
STAGES = ("build", "test", "bench", "report")
# Seconds: of a test; of the first import from a cold disk; of a file of op tests, most of which compile
# kernels; of a tool that runs everything far slower; of a benchmark of an op, which compiles each row with
# torch.compile.
TEST, FIRST_IMPORT, FILE, SLOW, BENCH, BUILD = 30, 120, 400, 240, 400, 560
# A stage begins no step after so many seconds, and cuts off the last ones so much later.
BUDGET, GRACE = 540.0, 40.0
# Tests at a time: they wait for compilers more than for the GPU. Those that were not in time get a second
# chance, a few at a time.
WORKERS, SECOND_CHANCES = min(16, os.cpu_count() or 1), 4
# The CUDA kernels' own tests, each file in one process before all else: a kernel that waits for ever would
# cost every later test its limit, and slow down all that runs beside it. What has passed is not run again,
# test by test.
TRIED_FIRST = tuple(f"tests/kernels/test_cuda_{name}.py" for name in ("verbs", "norm", "attention"))
# What the names of tests say that take a good part of the GPU's memory: one at a time.
LARGE = "2_31_elements"
UNFINISHED = 75  # EX_TEMPFAIL of sysexits.h
NOTHING_SELECTED = 5  # pytest's
PASSED, FAILED, HUNG = "passed", "failed", "hung"
# The step that says what can run here, and the one that says what calls cost the host: printed whole.
DOCTOR, HOST_TIME = "doctor", "host time"
GPU_BACKENDS = ("triton", "cuda")
# The ops whose rows are wanted most, should the time not be enough for all.
FIRST = ("attention", "layer_norm", "rms_norm", "add_norm", "linear_cross_entropy")
# Of a step's output, what is kept.
TAIL = 6000


@dataclass(frozen=True)
class Step:
    """One process. about, backend: the op whose kernels it is of, and which of them; empty: none alone.

    judges: what it is of is timed only if it passes.
    """

    stage: str
    name: str
    command: tuple[str, ...]
    limit: float
    about: str = ""
    backend: str = ""
    alone: bool = True
    judges: bool = True


@dataclass(frozen=True)
class Outcome:
    """How a step ended. status: passed, failed or hung."""

    status: str
    seconds: float
    output: str


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def pytest(*arguments: str) -> tuple[str, ...]:
    # A warning of a version that we have not seen is no error here.
    return python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", *arguments)


def plan() -> Iterator[Step]:
    """Every step, in order."""
    from lmkern.kernels.backends import backend_names

    install = ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", ".")
    yield Step("build", "install", python(*install), BUILD)
    yield Step("build", DOCTOR, python("-m", "benchmarks.gpu", "--doctor"), FIRST_IMPORT)
    for file in TRIED_FIRST:
        yield Step(
            "test", file, pytest("-vv", "-m", "gpu", file), FIRST_IMPORT, "", backend_of(file), alone=False
        )
    for name, about in gpu_tests():
        yield Step("test", name, pytest(name), TEST, about, backend_of(name), alone=LARGE in name)
    for path in sorted((ROOT / "tests" / "ops").glob("test_*.py")):
        file, about = path.relative_to(ROOT).as_posix(), op_of(path.stem.removeprefix("test_"))
        for backend in GPU_BACKENDS:
            if about and backend not in backend_names(about):
                continue
            command = pytest(file, "-k", backend)
            yield Step("test", f"{file} {backend}", command, FILE, about, backend, alone=False)
    yield Step("test", "offline compilation", pytest("tests/kernels/test_triton_compile.py"), SLOW)
    if sanitizer := shutil.which("compute-sanitizer"):
        for name, about in gpu_tests("memory_checked"):
            # Calls of the driver that fail are part of how torch and Triton find out what it can do.
            only_memory = ("--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9")
            step, command = f"compute-sanitizer {name}", (sanitizer, *only_memory, *pytest(name))
            # Not every machine lets it look.
            yield Step("test", step, command, SLOW, about, backend_of(name), alone=False, judges=False)
    for file, direction, backend in gpu_benchmarks():
        op = Path(file).stem.removeprefix("bench_")
        command = pytest(
            file, "-k", f"[{direction}- and -{backend}]", "-p", "no:logging",
            "--benchmark-enable", "--record", "--tested", "make gpu-test",
        )  # fmt: skip
        yield Step("bench", f"{op} {direction} {backend}", command, BENCH, op, backend)
    yield Step("report", HOST_TIME, python("-m", "benchmarks.host_time"), SLOW)
    yield Step("report", "pages", python("-m", "benchmarks.report"), SLOW)


def gpu_tests(marker: str = "gpu") -> list[tuple[str, str]]:
    """(node id, op) of every test with the marker."""
    # Of the op tests, which are thousands, the files that have such ones.
    files = (path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "tests" / "ops").glob("test_*.py")))
    marked = [file for file in files if f"mark.{marker}\n" in (ROOT / file).read_text(encoding="utf-8")]
    return [
        (name, op_of(*re.split(r"[][-]", name)[1:], Path(name.partition("::")[0]).stem))
        for name in collected("-m", marker, "tests/gpu", "tests/kernels", *marked)
    ]


def gpu_benchmarks() -> list[tuple[str, str, str]]:
    """(file, direction, backend) of all rows that a GPU can give, the ops that most depends on first."""
    found = set()
    for name in collected("benchmarks/ops"):
        file, _, parameters = name.removesuffix("]").partition("::")
        found.add((file, parameters.partition("[")[2].partition("-")[0], parameters.rpartition("-")[2]))
    first = [f"benchmarks/ops/bench_{op}.py" for op in FIRST]

    def place(row: tuple[str, str, str]) -> tuple[int, str, int, str]:
        file, direction, backend = row
        rank = first.index(file) if file in first else len(first)
        return rank, file, DIRECTIONS.index(direction), backend

    return sorted((row for row in found if row[2] in GPU_BACKENDS), key=place)


def collected(*arguments: str) -> list[str]:
    """The node ids that pytest finds; a file that cannot be imported here is told, and passed over."""
    command = pytest("--collect-only", "--continue-on-collection-errors", *arguments)
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = [line for line in found.stdout.splitlines() if "::" in line and not line.startswith("ERROR")]
    if found.returncode not in (0, NOTHING_SELECTED):
        print(f"gpu: not all can be collected:\n{found.stdout[-TAIL:]}\n{found.stderr}", file=sys.stderr)
        if not names:
            raise RuntimeError("gpu: nothing can be collected; the reason stands above")
    return names


def op_of(*words: str) -> str:
    """The op that one of a test's words begins with, the first that does; empty where none does."""
    from lmkern.kernels.backends import op_names

    for word in words:
        word = word.removeprefix("test_").removeprefix("cuda_")
        if found := max((op for op in op_names() if word.startswith(op)), key=len, default=""):
            return found
    return ""


def backend_of(name: str) -> str:
    """The backend that a test's name tells; empty where it tells none."""
    return next((backend for backend in GPU_BACKENDS if backend in name), "")


class Record:
    """The outcomes of the steps, kept in a file that is whole after each of them."""

    def __init__(self, path: Path, sources: str) -> None:
        self.path, self.sources = path, sources
        self.outcomes: dict[str, Outcome] = {}
        self.lock = threading.Lock()
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["sources"] == sources:
                self.outcomes = {name: Outcome(**outcome) for name, outcome in kept["steps"].items()}

    @staticmethod
    def key(step: Step) -> str:
        return f"{step.stage}: {step.name}"

    def keep(self, step: Step, outcome: Outcome) -> None:
        with self.lock:
            self.outcomes[self.key(step)] = outcome
            self.path.parent.mkdir(parents=True, exist_ok=True)
            steps = {name: asdict(outcome) for name, outcome in self.outcomes.items()}
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps({"sources": self.sources, "steps": steps}, indent=1), encoding="utf-8")
            part.replace(self.path)

    def done(self, step: Step) -> bool:
        """Whether it has run: tests that did not pass are kept, and what hung; all else is tried again."""
        outcome = self.outcomes.get(self.key(step))
        return outcome is not None and (outcome.status in (PASSED, HUNG) or step.stage == "test")

    def forget_failures(self) -> None:
        self.outcomes = {name: one for name, one in self.outcomes.items() if one.status == PASSED}

    def status(self, step: Step) -> str | None:
        """None for one that has not run."""
        outcome = self.outcomes.get(self.key(step))
        return None if outcome is None else outcome.status

    def red(self, timed: Step, steps: Sequence[Step]) -> list[str]:
        """The tests of what a step times, an op on a backend, that did not pass, or have not run."""
        tests = [
            step
            for step in steps
            if step.stage == "test" and step.judges
            if step.about == timed.about and step.backend in (timed.backend, "")
        ]
        return [step.name for step in tests if self.status(step) != PASSED]


def run(step: Step, limit: float | None = None) -> Outcome:
    """The step's outcome; at its limit, or the one given, it is ended together with all that it started."""
    start = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if step.stage == "build":
        environment.setdefault("LMKERN_CUDA", "1")
    environment.setdefault("LMKERN_COMMIT", commit_name())
    # A file and no pipe, which anything that lives on would keep open.
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(step.limit if limit is None else limit)
            status = PASSED if code in (0, NOTHING_SELECTED) else FAILED
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status = HUNG
            # One that waits for a driver may not die.
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
        log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL))
        output = log.read().decode(errors="replace")
    return Outcome(status, round(time.monotonic() - start, 1), output)


def run_stage(
    stage: str, steps: Sequence[Step], record: Record, deadline: float, *, anyway: bool = False
) -> int:
    """0 when every step of the stage has passed, UNFINISHED when time ran out, 1 when some did not pass."""
    waiting = [step for step in steps if step.stage == stage and not record.done(step)]
    first = [step for step in waiting if step.name in TRIED_FIRST]

    def one(step: Step) -> bool:
        left = deadline - time.monotonic()
        if left < 0:
            return False
        red = record.red(step, steps) if stage == "bench" else []
        if red and anyway:
            words = {"--record": f"--record={record.path.parent / 'red'}", "make gpu-test": f"{len(red)} red"}
            step = replace(step, command=tuple(words.get(word, word) for word in step.command))
        if red and not anyway:
            outcome = Outcome(FAILED, 0.0, f"not timed: {len(red)} tests are not green, first {red[0]}")
        else:
            outcome = run(step, min(step.limit, left + GRACE))
            if outcome.status == HUNG and step.limit > left + GRACE:
                return False
        record.keep(step, outcome)
        print(f"{outcome.status:6} {outcome.seconds:6.1f} s  {step.stage}: {step.name}", flush=True)
        whole = step.name in (DOCTOR, HOST_TIME)
        if outcome.status != PASSED or whole:
            lines = outcome.output.splitlines()
            print("    " + "\n    ".join(lines if whole else lines[-12:]), flush=True)
        return True

    with ThreadPoolExecutor(WORKERS) as pool:
        begun = list(pool.map(one, first))
    for step in first:
        for other, outcome in settled(step, record.status(step), steps):
            if not record.done(other):
                record.keep(other, outcome)
    waiting = [step for step in waiting if step not in first and not record.done(step)]
    # The longest first, or they would end alone.
    together = sorted((step for step in waiting if not step.alone), key=lambda step: -step.limit)
    with ThreadPoolExecutor(WORKERS) as pool:
        begun += pool.map(one, together)
    late = [step for step in together if record.status(step) == HUNG]
    with ThreadPoolExecutor(SECOND_CHANCES) as pool:
        list(pool.map(one, late))
    begun += [one(step) for step in waiting if step.alone]
    if not all(begun):
        print(f"gpu: {stage}: {begun.count(False)} steps are left; call it again to go on")
        return UNFINISHED
    bad = [step.name for step in steps if step.stage == stage and record.status(step) != PASSED]
    print(f"gpu: {stage}: {len(bad)} steps did not pass" if bad else f"gpu: {stage}: passed")
    return 1 if bad else 0


def settled(tried: Step, status: str | None, steps: Sequence[Step]) -> Iterator[tuple[Step, Outcome]]:
    """What need not be run after a file of TRIED_FIRST: its tests, or what of its backend may hang too."""
    tests = [step for step in steps if step.name.startswith(f"{tried.name}::")]
    if status == PASSED:
        yield from ((test, Outcome(PASSED, 0.0, f"in the one process of {tried.name}")) for test in tests)
    if status == HUNG:
        ops = {test.about for test in tests} - {""}
        alike = (step for step in steps if step.backend == tried.backend and step.about in ops)
        for step in {*tests, *(step for step in alike if step.stage == "test")}:
            yield step, Outcome(HUNG, 0.0, f"not run: {tried.name} hangs")


@cache
def commit_name() -> str:
    """The commit; of a tree with local changes a digest of its sources, so that rows of one run may join."""
    commit = machine.commit()
    return commit if commit.isalnum() else f"sources{machine.sources()[:12]}"


def doctor() -> int:
    """What can run here, as `lmkern doctor` says it, without the packages that the command line needs."""
    from lmkern.kernels.backends import describe

    for row in describe():
        print(f"{row.op:22}{row.backend:11}{'yes' if row.usable else 'no':5}{row.reason}")
    for name, value in machine.environment().items():
        print(f"{name}: {value}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)}; all by default")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds a stage begins steps for")
    parser.add_argument("--state", type=Path, default=STATE, help="folder of what has been done")
    parser.add_argument("--only", action="append", help="this op alone; may be given several times")
    parser.add_argument("--anyway", action="store_true", help="time what has red tests too, into STATE/red")
    parser.add_argument("--again", action="store_true", help="run what did not pass once more")
    parser.add_argument("--dry-run", action="store_true", help="print the plan")
    parser.add_argument("--doctor", action="store_true", help="print what can run here")
    options = parser.parse_args(arguments)
    stages = options.stages or STAGES
    if unknown := set(stages) - set(STAGES):
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    if options.doctor:
        return doctor()
    if not options.dry_run and machine.choose_device().type != "cuda":
        print("gpu: needs a CUDA GPU and none is visible; --dry-run prints the plan", file=sys.stderr)
        return 2
    steps = [step for step in plan() if step.stage in stages or step.stage == "test"]
    if options.only:
        steps = [step for step in steps if step.about in ("", *options.only)]
    if options.dry_run:
        for step in steps:
            print(f"{step.stage:7}{step.limit:5.0f} s  {step.name}: {' '.join(step.command)}")
        return 0
    record = Record(options.state / "steps.json", machine.sources())
    if options.again:
        record.forget_failures()
    worst = 0
    for stage in stages:
        status = run_stage(stage, steps, record, time.monotonic() + options.budget, anyway=options.anyway)
        if status == UNFINISHED:
            return status
        worst = max(worst, status)
    return worst


if __name__ == "__main__":
    sys.exit(main())
