"""What the benchmarks of the ops declare."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.contest import DIRECTIONS, DTYPES
from benchmarks.ops import bench_attention
from lmkern.kernels import backends
from lmkern.testing import AttentionShape

FILES = sorted((Path(__file__).parents[2] / "benchmarks" / "ops").glob("bench_*.py"))


def module_of(path: Path) -> ModuleType:
    return importlib.import_module(f"benchmarks.ops.{path.stem}")


def test_every_op_has_a_benchmark() -> None:
    assert {module_of(path).OP for path in FILES} == set(backends.op_names())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_cases_are_named_apart(path: Path) -> None:
    module = module_of(path)
    assert path.stem == f"bench_{module.OP}"
    for cases in (module.CASES, module.GPU_CASES, module.QUICK_CASES):
        rows = [
            (str(case), direction, dtype)
            for case in cases
            for direction in case.directions
            for dtype in case.dtypes
        ]
        assert len(set(rows)) == len(rows)
        assert all(direction in DIRECTIONS and dtype in DTYPES for _, direction, dtype in rows)
    # One shape an op in README.md; none where a GPU has no kernel of it.
    for cases in (module.CASES, module.GPU_CASES):
        assert len({str(case.shape) for case in cases if case.main}) == bool(cases)
    assert module.CASES


@pytest.mark.parametrize(
    "shape",
    [
        AttentionShape(1, 2, 5, 8, 7, 2, True),
        AttentionShape(1, 2, 7, 8, 5, 2, True),
        AttentionShape(1, 2, 1, 8, 7, 2, True),
        AttentionShape(1, 2, 6, 8, 6, 2, False),
    ],
    ids=str,
)
def test_seen_scores_are_those_of_the_mask(shape: AttentionShape) -> None:
    scores = torch.ones(shape.N_q, shape.N_k)
    seen = scores if shape.diagonal is None else scores.tril(shape.diagonal)
    assert bench_attention.seen_scores(shape) == int(seen.sum())
