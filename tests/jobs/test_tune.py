"""The search of kernels' constants, with a clock that the test sets, on kernels that Triton interprets."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from lmkern.cli.main import USAGE_ERROR, main
from lmkern.jobs import tune as job
from lmkern.jobs.tune import Workload, candidates, search, tune
from lmkern.kernels import triton_runtime, tuning

KEY = ("interpreter", "layer_norm", "forward", "4-64")


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("LMKERN_TUNING", str(tmp_path / "tuning.json"))
    tuning._forget()
    yield tmp_path / "tuning.json"
    tuning._forget()


def looked_up(**constants: int) -> dict[str, int]:
    return tuning.lookup(*KEY[1:3], "interpreter", KEY[3], constants)


def test_candidates_are_the_defaults_neighbours() -> None:
    found = list(candidates({"BLOCK_M": 64, "num_warps": 4, "num_stages": 2}))
    assert {one["BLOCK_M"] for one in found} == {32, 64, 128}
    assert {one["num_warps"] for one in found} == {4, 8}
    assert {one["num_stages"] for one in found} == {1, 2, 3, 4}
    assert len(found) == 3 * 2 * 4 - 1


@pytest.mark.parametrize(("fast", "gain"), [(0.5, 2.0), (0.99, 1.0)], ids=["much", "noise"])
def test_the_fastest_that_is_right_is_chosen(fast: float, gain: float) -> None:
    def call() -> tuple[torch.Tensor]:
        block = looked_up(BLOCK_R=8)["BLOCK_R"]
        if block == 1:
            raise RuntimeError("too much shared memory")
        return (torch.full((4,), float("nan") if block == 4 else 1.0),)

    def measure(call: object) -> float:
        return {8: 1.0, 16: fast, 4: 0.1}[looked_up(BLOCK_R=8)["BLOCK_R"]]

    found = search(call, KEY, {"BLOCK_R": 8}, measure)
    assert found.constants == {"BLOCK_R": 16 if gain > 1 else 8}
    assert found.speedup == pytest.approx(gain)


@pytest.mark.skipif(not triton_runtime.interpreted(), reason="needs TRITON_INTERPRET=1 (make test sets it)")
def test_what_is_found_is_kept_used_and_not_searched_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, int]] = []

    def measure(call: object) -> float:
        with tuning.observe():
            chosen = tuning.lookup(*KEY[1:3], "interpreter", KEY[3], {"BLOCK_R": 32, "num_warps": 4})
        calls.append(chosen)
        return 1.0 if chosen["BLOCK_R"] == 32 else 0.5

    def small(device: str) -> job.Call:
        x = torch.randn(40, 64)

        def call() -> job.Results:
            return (job.lmkern.layer_norm(x, (64,), backend="triton"),)

        return call

    search_all = partial(tune, device="cpu", measure=measure, workloads=[Workload("layer_norm", small)])
    progress: list[tuple[object, ...]] = []
    (found,) = search_all(progress=lambda *words: progress.append(words))
    assert found.key == KEY
    assert found.speedup == 2.0
    assert progress
    assert tuning.load(path) == {KEY: found.constants}
    with tuning.observe() as seen:
        small("cpu")()
    assert tuning.lookup(*KEY[1:3], "interpreter", KEY[3], seen[KEY]) == found.constants
    count = len(calls)
    assert search_all() == []
    assert len(calls) == count
    assert len(search_all(again=True)) == 1


def test_an_op_without_kernels_to_tune_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected op to be one of .*layer_norm.*; got 'copy'"):
        tune("copy", device="cpu")


def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["tune-kernels"]) == USAGE_ERROR
    assert "expected a CUDA or ROCm GPU; none is visible" in capsys.readouterr().err
    assert main(["tune-kernel"]) == USAGE_ERROR
    assert "did you mean tune-kernels?" in capsys.readouterr().err


@pytest.mark.skipif(not triton_runtime.interpreted(), reason="needs TRITON_INTERPRET=1 (make test sets it)")
@pytest.mark.parametrize(
    "make",
    [
        partial(job._norm, 64, 0.0, elements=256),
        partial(job._cross_entropy, 64, elements=256),
        partial(job._activation, "silu", True, rows=1),
        partial(job._rotary, 16, tokens=3),
    ],
    ids=["norm", "cross_entropy", "activation", "rotary"],
)
def test_workloads_look_constants_up(make: object) -> None:
    """The workloads' own code, on sizes that the interpreter can take."""
    with tuning.override({}), tuning.observe() as seen:
        make("cpu")()  # type: ignore[operator]
    assert seen
