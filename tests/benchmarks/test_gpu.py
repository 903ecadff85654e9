"""`make gpu` as far as it goes without a GPU: its plan, its records, and the GPU tests' own code on a CPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import FAILED, HUNG, PASSED, UNFINISHED, Outcome, Record, Step

ROOT = Path(__file__).parents[2]
# What a machine with a GPU may not have: the plan, the tests and the benchmarks there do without.
ABSENT = ("tyro", "ftfy", "tokenizers", "matplotlib", "markdown_it", "tqdm", "transformers")
BLOCK = f"""
import sys
# As importlib understands it: not there, and not to be looked for.
sys.modules.update(dict.fromkeys({ABSENT}))
"""


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


# The GPU tests on the CPU, with small numbers where they have large ones.
ON_GPU = load(ROOT / "tests" / "gpu" / "test_ops.py")
ON_GPU.DEVICE, ON_GPU.REPEATS, ON_GPU.LARGE_ROWS, ON_GPU.LARGE_BATCH = "cpu", 2, 96, 3


def step(
    name: str, code: str, *, stage: str = "test", about: str = "", backend: str = "", limit: float = 60
) -> Step:
    return Step(stage, name, (sys.executable, "-c", code), limit, about, backend)


def test_the_plan_tests_every_op_before_it_times_it() -> None:
    steps = list(gpu.plan())
    tested = {step.about for step in steps if step.stage == "test"}
    timed = [step for step in steps if step.stage == "bench"]
    from lmkern.kernels.backends import backend_names, op_names

    with_gpu = {op for op in op_names() if {"triton", "cuda"} & set(backend_names(op))}
    assert {step.about for step in timed} == with_gpu
    assert [step.about for step in timed[:4]] == ["attention"] * 4
    assert {(step.about, step.backend) for step in timed} == {
        (op, backend) for op in op_names() for backend in backend_names(op) if backend in gpu.GPU_BACKENDS
    }
    assert with_gpu <= tested
    assert [step.stage for step in steps] == sorted((step.stage for step in steps), key=gpu.STAGES.index)
    assert len({Record.key(step) for step in steps}) == len(steps)
    compiled = [
        step for step in steps if "test_changing_batch_sizes_compile_at_most_once_more_on_a" in step.name
    ]
    assert {step.about for step in compiled} >= {"attention", "layer_norm", "cross_entropy"}
    assert all(step.limit < 600 for step in steps)
    assert sum(step.alone for step in steps if gpu.LARGE in step.name) == 8
    for file, op in (
        ("test_cuda_norm", "layer_norm"),
        ("test_cuda_norm", "add_norm"),
        ("test_cuda_attention", "attention"),
    ):
        found = [step for step in steps if file in step.name and step.about == op]
        # A kernel that hangs costs its own half a minute.
        assert found and all(step.backend == "cuda" and step.limit <= 30 for step in found), (file, op)
    cuda = {op for op in op_names() if "cuda" in backend_names(op)}
    assert {step.about for step in timed if step.backend == "cuda"} == cuda
    assert {step.about for step in steps if step.stage == "test" and step.backend == "cuda"} == {"", *cuda}


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main(["report"]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_a_step_that_hangs_is_ended_with_its_children() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.monotonic()
    outcome = gpu.run(step("sleeper", code, limit=2))
    assert outcome.status == HUNG
    assert time.monotonic() - start < 30


def test_outcomes_are_kept_as_they_come_and_passed_steps_are_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    write = f"open({str(log)!r}, 'a').write('x')"
    steps = [step("good", write), step("bad", "raise SystemExit('the reason')"), step("last", write)]
    path = tmp_path / "state" / "steps.json"
    late = time.monotonic() + 60
    assert gpu.run_stage("test", steps, Record(path, "abc"), late) == 1
    assert log.read_text() == "xx"
    kept = json.loads(path.read_text())["steps"]
    assert kept["test: bad"]["status"] == FAILED
    assert "the reason" in kept["test: bad"]["output"]
    assert "the reason" in capsys.readouterr().out
    again = Record(path, "abc")
    assert gpu.run_stage("test", steps, again, late) == 1
    assert log.read_text() == "xx"
    again.forget_failures()
    assert not again.done(steps[1])
    assert gpu.run_stage("test", steps, Record(path, "another tree"), late) == 1
    assert log.read_text() == "xxxx"


def test_a_stage_out_of_time_is_told_apart(tmp_path: Path) -> None:
    record = Record(tmp_path / "steps.json", "abc")
    assert gpu.run_stage("test", [step("one", "pass")], record, time.monotonic() - 1) == UNFINISHED
    assert not record.outcomes


def test_what_was_late_beside_others_gets_a_second_chance(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    once = f"import pathlib as p, time; seen = p.Path({str(seen)!r})"
    code = f"{once}; seen.exists() or seen.touch() or time.sleep(60)"
    steps = [dataclasses.replace(step("late", code, limit=3), alone=False)]
    record = Record(tmp_path / "steps.json", "abc")
    assert gpu.run_stage("test", steps, record, time.monotonic() + 60) == 0
    assert record.status(steps[0]) == PASSED


def test_what_the_end_of_a_stage_cuts_off_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    record = Record(tmp_path / "steps.json", "abc")
    slow = step("slow", "import time; time.sleep(60)")
    assert gpu.run_stage("test", [slow], record, time.monotonic() + 0.5) == UNFINISHED
    assert not record.outcomes


def test_a_file_that_cannot_be_imported_hides_no_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_good.py").write_text("def test_this(): pass\n")
    (tmp_path / "test_bad.py").write_text("import a_package_that_is_not_here\n")
    assert [name.partition("::")[2] for name in gpu.collected(str(tmp_path))] == ["test_this"]
    assert "a_package_that_is_not_here" in capsys.readouterr().err


def test_a_row_is_recorded_as_it_comes_and_not_timed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conftest = load(ROOT / "benchmarks" / "conftest.py")
    row = {"op": "copy", "direction": "forward", "shape": "R1-C1", "dtype": "float32", "backend": "triton"}
    stash = {conftest.rows_key: [row], conftest.commit_key: "abc", conftest.ceilings_key: {"copy": 1.0}}
    options = {"record": str(tmp_path), "tested": "these"}
    config: Any = SimpleNamespace(stash=stash, getoption=options.get)
    assert conftest.on_file(config) == set()
    conftest.record(config)
    assert conftest.on_file(config) == {tuple(row.values())}
    stash[conftest.rows_key] = [row | {"shape": "R2-C2"}]
    conftest.record(config)
    assert len(conftest.on_file(config)) == 2
    for commit in ("another", "abc with local changes"):
        stash[conftest.commit_key] = commit
        assert conftest.on_file(config) == set()
    conftest.record(config)
    assert conftest.on_file(config) == set(), "of no commit: timed again"


def test_a_backend_with_red_tests_of_an_op_is_not_timed(tmp_path: Path) -> None:
    record = Record(tmp_path / "steps.json", "abc")
    places = [("copy", "triton"), ("copy", "cuda"), ("rotary", "triton"), ("gelu", "triton")]
    tests = [step(f"of {op} on {backend}", "pass", about=op, backend=backend) for op, backend in places]
    tests.append(step("of gelu", "pass", about="gelu"))
    for test, status in zip(tests, (PASSED, FAILED, HUNG, PASSED, FAILED), strict=True):
        record.keep(test, Outcome(status, 1.0, ""))
    timed = [
        step(f"{op} {backend}", "pass", stage="bench", about=op, backend=backend) for op, backend in places
    ]
    assert gpu.run_stage("bench", [*tests, *timed], record, time.monotonic() + 60) == 1
    assert record.outcomes["bench: copy triton"].status == PASSED
    for place, red in (("copy cuda", "of copy on cuda"), ("rotary triton", "of rotary on triton")):
        assert record.outcomes[f"bench: {place}"] == Outcome(
            FAILED, 0.0, f"not timed: 1 tests are not green, first {red}"
        )
    # A test that tells no backend judges all of them.
    assert record.outcomes["bench: gelu triton"].status == FAILED


def test_rows_with_red_tests_are_kept_apart_if_they_are_wanted_anyway(tmp_path: Path) -> None:
    record = Record(tmp_path / "steps.json", "abc")
    test, given = step("of copy", "pass", about="copy"), tmp_path / "given"
    record.keep(test, Outcome(FAILED, 1.0, ""))
    code = f"import sys; open({str(given)!r}, 'w').write(' '.join(sys.argv[1:]))"
    timed = step("copy triton", code, stage="bench", about="copy", backend="triton")
    timed = dataclasses.replace(timed, command=(*timed.command, "--record", "--tested", "make gpu-test"))
    assert gpu.run_stage("bench", [test, timed], record, time.monotonic() + 60) == 1
    assert not given.exists()
    assert gpu.run_stage("bench", [test, timed], record, time.monotonic() + 60, anyway=True) == 0
    assert given.read_text() == f"--record={tmp_path / 'red'} --tested 1 red"
    assert all(
        {"--record", "make gpu-test"} <= {*step.command} for step in gpu.plan() if step.stage == "bench"
    )


@pytest.mark.parametrize("status", [PASSED, FAILED, HUNG])
def test_a_file_of_cuda_tests_is_tried_at_once_before_all_else(
    status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    code = f"open({str(log)!r}, 'a').write('x')"
    monkeypatch.setattr(gpu, "TRIED_FIRST", ("file.py",))
    first = {PASSED: "pass", FAILED: "raise SystemExit(1)", HUNG: "import time; time.sleep(60)"}[status]
    steps = [
        step("other.py attention", code, about="attention", backend="cuda"),
        step("other.py triton", code, about="attention", backend="triton"),
        step("other.py norm", code, about="layer_norm", backend="cuda"),
        step("file.py", first, backend="cuda", limit=3 if status == HUNG else 60),
        step("file.py::one", code, about="attention", backend="cuda"),
        step("file.py::two", code, backend="cuda"),
    ]
    record = Record(tmp_path / "steps.json", "abc")
    assert gpu.run_stage("test", steps, record, time.monotonic() + 60) == (status != PASSED)
    # Passed: its tests are not run again. Hangs: nothing that may hang as well is begun.
    assert log.read_text() == "x" * {PASSED: 3, FAILED: 5, HUNG: 2}[status]
    found = [record.status(step) for step in steps]
    others = HUNG if status == HUNG else PASSED
    assert found == [others, PASSED, PASSED, status, others, others]


def test_the_sanitizer_finds_faults_and_keeps_nothing_from_being_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    checked = [step for step in gpu.plan() if step.name.startswith("compute-sanitizer")]
    assert checked and not any(step.judges for step in checked)
    record = Record(tmp_path / "steps.json", "abc")
    timed = step("row", "pass", stage="bench", about=checked[0].about, backend=checked[0].backend)
    assert not record.red(timed, checked)


# One of each op; the others differ in shapes and options.
PLAYED = list({op.op: op for op in reversed(ON_GPU.OPS)}.values())
PLAYED += [op for op in ON_GPU.OPS if op.name.startswith(("packed", "dropout", "paged"))]


@pytest.mark.parametrize("op", PLAYED, ids=str)
def test_gpu_tests_run_on_a_cpu(op: Any) -> None:
    """The code of the GPU tests, with the CPU kernels in the GPU's place."""
    ON_GPU.test_results_are_those_of_float64_from_poisoned_memory(op, "cpu", op.dtypes[0])
    ON_GPU.test_ten_times_the_same_bits(op, "cpu", op.dtypes[0])


def test_gpu_tests_fail_for_wrong_results() -> None:
    op = next(op for op in ON_GPU.OPS if op.op == "rms_norm")

    def wrong(backend: str, **inputs: Any) -> dict[str, torch.Tensor]:
        results = op.run(backend, **inputs)
        if backend == "cpu":
            results["dweight"].view(-1)[0] += torch.rand(()) * results["dweight"].norm() + 1
        return results

    broken = dataclasses.replace(op, run=wrong)
    with pytest.raises(AssertionError, match="dweight: off by"):
        ON_GPU.test_results_are_those_of_float64_from_poisoned_memory(broken, "cpu", torch.float32)
    with pytest.raises(AssertionError, match="dweight: other bits"):
        ON_GPU.test_ten_times_the_same_bits(broken, "cpu", torch.float32)


def test_gpu_tests_of_large_tensors_run_on_a_cpu() -> None:
    for name in ("layer_norm", "rms_norm"):
        ON_GPU.test_more_than_2_31_elements_norm(name, "cpu")
    ON_GPU.test_first_call_of_a_thread_attention("cpu")
    ON_GPU.test_more_than_2_31_elements_attention("cpu")
    ON_GPU.test_more_than_2_31_elements_cross_entropy("cpu")
    ON_GPU.test_memory_is_read_and_written_in_bounds(ON_GPU.CHECKED[0], "cpu", torch.bfloat16)


def test_nothing_that_runs_on_a_gpu_needs_packages_of_the_rest() -> None:
    """Imports the driver, the benchmarks, their pages and the GPU tests where those packages are missing."""
    code = BLOCK + (
        "import pytest, benchmarks.gpu, benchmarks.report\n"
        "assert benchmarks.report.pictures() is None\n"
        "benchmarks.gpu.doctor()\n"
        "raise SystemExit(pytest.main(['-q', '--collect-only', 'tests/gpu', 'tests/kernels', 'tests/ops', "
        "'benchmarks/ops']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
