"""The CUDA kernels of layer_norm, rms_norm and add_norm: on a GPU, and on the CPU through an emulator.

The first is what RUN_ON_HARDWARE in lmkern/kernels/norm_cuda.py stands for; the second is
tests/csrc/cuda_emulator.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import lmkern
from lmkern.kernels import backends, cuda_call, norm_cuda, philox
from lmkern.kernels.add_norm import Options
from lmkern.testing import (
    LAYER_NORM_SHAPES,
    Errors,
    LayerNormShape,
    layer_norm_inputs,
    measure,
    over_budget,
    poisoned_memory,
    seeded_randn,
)

SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
OPS = ("layer_norm", "rms_norm", "add_norm")
EPS = 1e-5
SEED = -0x123456789ABCDEF
# In the order of each op's needs.
GRADIENTS = {
    "layer_norm": ("dx", "dweight", "dbias"),
    "rms_norm": ("dx", "dweight"),
    "add_norm": ("dx", "dresidual", "dweight", "dbias"),
}

# Widths at which another kernel takes over: a pack for each thread of a warp, a block's registers.
BORDERS = tuple(LayerNormShape(2, E) for E in (32, 128, 132, 256, 264, 4096, 4097, 8192, 8200, 16384, 16392))
SHAPES = tuple(
    LayerNormShape(R, E)
    for R, E in ((1, 1), (5, 3), (33, 65), (19, 264), (9, 1000), (2, 4097), (2, 8200), (2, 16392))
)


@dataclass(frozen=True, slots=True)
class Case:
    """One op and what its call says beside tensors; residual and parameters have x's dtype by default."""

    op: str
    dtype: torch.dtype = SINGLE
    residual: torch.dtype | None = None
    parameters: torch.dtype | None = None
    norm: str = "layer"
    offset: float = 0.0
    dropout_p: float = 0.0

    def __str__(self) -> str:
        types = (str(t).removeprefix("torch.") for t in (self.dtype, self.residual, self.parameters) if t)
        return "-".join((self.op, *types, self.norm))

    @property
    def centred(self) -> bool:
        return self.op == "layer_norm" or (self.op == "add_norm" and self.norm == "layer")


@dataclass(frozen=True, slots=True)
class Inputs:
    x: Tensor
    residual: Tensor
    weight: Tensor | None
    bias: Tensor | None
    dy: Tensor
    dh: Tensor | None

    def double(self) -> Inputs:
        return self.each(Tensor.double)

    def each(self, change: Any) -> Inputs:
        fields = {name: getattr(self, name) for name in self.__slots__}
        return Inputs(**{name: None if x is None else change(x) for name, x in fields.items()})


def inputs_of(case: Case, shape: LayerNormShape, device: str) -> Inputs:
    x, weight, bias, dy = layer_norm_inputs(shape, case.dtype, parameter_dtype=case.parameters, device=device)
    randn = seeded_randn(1, case.residual or case.dtype, device)
    residual, dh = randn(shape.R, shape.E), randn(shape.R, shape.E)
    return Inputs(x, residual, weight, bias if case.centred else None, dy, dh)


def run(backend: str, case: Case, given: Inputs, needs: tuple[bool, ...] | None = None) -> dict[str, Any]:
    """Every result by its name, from memory that was NaN before."""
    kernels: ModuleType = backends.load(case.op, backend)
    x, residual, weight, bias, dy, dh = (getattr(given, name) for name in Inputs.__slots__)
    names = GRADIENTS[case.op]
    if needs is None:
        needs = tuple(case.centred or name != "dbias" for name in names)
    found: dict[str, Any]
    with poisoned_memory():
        if case.op == "layer_norm":
            y, mean, rstd = kernels.forward(x, weight, bias, eps=EPS)
            found = {"y": y, "mean": mean, "rstd": rstd}
            gradients = kernels.backward(dy, x, weight, mean, rstd, needs=needs)
        elif case.op == "rms_norm":
            y, rstd = kernels.forward(x, weight, eps=EPS, offset=case.offset)
            found = {"y": y, "rstd": rstd}
            gradients = kernels.backward(dy, x, weight, rstd, offset=case.offset, needs=needs)
        else:
            seed = torch.tensor(SEED, device=x.device) if case.dropout_p else None
            options = Options(case.centred, EPS, case.offset, case.dropout_p, seed)
            y, h, mean, rstd = kernels.forward(x, residual, weight, bias, options)
            found = {"y": y, "h": h, "mean": mean, "rstd": rstd}
            gradients = kernels.backward(dy, dh, h, weight, mean, rstd, options, needs=needs)
    return found | dict(zip(names, gradients, strict=True))


def errors(case: Case, given: Inputs) -> dict[str, Errors]:
    """Against float64, with the reference's error in x's dtype as the measure."""
    ours, torchs = run("cuda", case, given), run("reference", case, given)
    exact = run("reference", case, given.double())
    found = {}
    for name, result in ours.items():
        if result is None:
            assert torchs[name] is None
            continue
        assert result.dtype == torchs[name].dtype, name
        # dx is a difference of terms of the size of dy weight rstd.
        size = float(given.dy.abs().max()) if name in ("dx", "dresidual") and given.dy.numel() else 0.0
        found[name] = measure(result, torchs[name], exact[name], at_least=size)
    return found


def assert_close(case: Case, given: Inputs) -> None:
    for name, one in errors(case, given).items():
        assert not (reason := over_budget(name, one, 1.0)), reason


CASES = (
    (Case("layer_norm", SINGLE), SHAPES + BORDERS),
    (Case("layer_norm", BRAIN), SHAPES + BORDERS),
    (Case("layer_norm", HALF, parameters=SINGLE), SHAPES),
    (Case("rms_norm", BRAIN), SHAPES),
    (Case("rms_norm", SINGLE, offset=1.0), SHAPES),
    (Case("add_norm", SINGLE, dropout_p=0.3), SHAPES),
    (Case("add_norm", HALF, parameters=SINGLE, offset=1.0), SHAPES),
    (Case("add_norm", BRAIN, SINGLE, SINGLE, norm="rms", dropout_p=0.3), SHAPES),
    (Case("add_norm", HALF, SINGLE), SHAPES),
)


@pytest.mark.parametrize(("case", "shapes"), CASES, ids=[str(case) for case, _ in CASES])
def test_every_result_matches_float64(case: Case, shapes: tuple[LayerNormShape, ...], device: str) -> None:
    # Time is short on the emulator.
    for shape in shapes if device == "cpu" else (*shapes, *LAYER_NORM_SHAPES, LayerNormShape(30_000, 72)):
        assert_close(case, inputs_of(case, shape, device))


# Rows that clusters of 2, 4, 8, 8 with their sums in shared memory, and 16 blocks hold; rows off the 16-byte
# grid that 16 hold, and that none does.
WIDE = (
    (Case("layer_norm"), 8, 8_200),
    (Case("add_norm", HALF, dropout_p=0.3), 8, 16_400),
    (Case("layer_norm", BRAIN), 1, 33_000),
    (Case("add_norm", BRAIN, residual=SINGLE, dropout_p=0.3), 8, 65_544),
    (Case("rms_norm", BRAIN, offset=1.0), 1, 131_080),
    (Case("layer_norm"), 1, 262_144),
    (Case("layer_norm", HALF, parameters=SINGLE), 1, 30_001),
    (Case("rms_norm"), 1, 66_001),
)


@pytest.fixture
def many_processors(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for more than one cluster, so that each has rows of its own."""
    if device == "cpu":
        monkeypatch.setattr(cuda_call, "processors", lambda device: 32)


@pytest.mark.usefixtures("many_processors")
@pytest.mark.parametrize(("case", "R", "E"), WIDE, ids=str)
def test_rows_of_clusters(case: Case, R: int, E: int, device: str) -> None:
    assert_close(case, inputs_of(case, LayerNormShape(R, E), device))


def test_wide_rows_on_a_gpu_without_clusters(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda":
        pytest.skip("only the emulator can be without")
    monkeypatch.setenv("CUDA_EMULATOR_NO_CLUSTERS", "1")
    case = Case("add_norm", BRAIN, dropout_p=0.3)
    assert_close(case, inputs_of(case, LayerNormShape(3, 16_392), device))


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize("E", [13, 96, 4100, 16392])
def test_dropout_keeps_what_philox_keeps_and_scales_it(E: int, dtype: torch.dtype, device: str) -> None:
    ones = torch.ones(5, E, dtype=dtype, device=device)
    zeros = torch.zeros_like(ones)
    case = Case("add_norm", dtype, dropout_p=0.3)
    found = run("cuda", case, Inputs(ones, zeros, None, None, zeros, ones))
    kept = philox.keep_mask(torch.tensor(SEED, device=device), 0.3, ones.shape)
    factors = kept * torch.tensor(philox.keep_scale(0.3), dtype=SINGLE, device=device)
    assert torch.equal(found["h"], factors.to(dtype))
    assert torch.equal(found["dx"], factors.to(dtype))
    assert torch.equal(found["dresidual"], ones)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("E", [100, 16392])
def test_y_is_the_norm_of_h_as_stored(E: int, norm: str, device: str) -> None:
    case = Case("add_norm", BRAIN, norm=norm)
    given = inputs_of(case, LayerNormShape(5, E), device)
    found = run("cuda", case, given)
    assert torch.equal(found["h"], given.residual + given.x)
    alone = run("cuda", Case(f"{norm}_norm", BRAIN), replace(given, x=found["h"]))
    assert torch.equal(found["y"], alone["y"])


@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_weight_bias_and_dh_may_be_missing(op: str, with_weight: bool, with_bias: bool, device: str) -> None:
    case = Case(op, BRAIN, offset=1.0)
    given = inputs_of(case, LayerNormShape(9, 96), device)
    weight, bias = given.weight if with_weight else None, given.bias if with_bias else None
    assert_close(case, replace(given, weight=weight, bias=bias, dh=given.dh if with_bias else None))


@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("which", ["x", "residual", "dy", "dh", "weight"])
def test_rows_may_lie_apart_and_off_the_16_byte_grid(which: str, offset: int, device: str) -> None:
    case = Case("add_norm", BRAIN)
    for E in (96, 8200) if which == "dh" else (96,):
        wide = inputs_of(case, LayerNormShape(4, E + 16), device)
        given = wide.each(lambda x, E=E: x[..., :E].clone())
        assert_close(case, replace(given, **{which: getattr(wide, which)[..., offset : offset + E]}))


def test_row_strides_may_be_anything(device: str) -> None:
    case = Case("layer_norm", BRAIN)
    given = inputs_of(case, LayerNormShape(7, 96), device)
    odd = inputs_of(case, LayerNormShape(7, 99), device)
    assert_close(case, replace(given, x=odd.x[:, :96]))
    assert_close(case, replace(given, dy=odd.dy[:, :96]))
    assert_close(case, replace(given, dy=given.dy[:1].expand(7, 96)))


@pytest.mark.parametrize(("op", "E"), [*((op, 40) for op in OPS), ("layer_norm", 8200)])
def test_only_the_gradients_asked_for_are_computed(op: str, E: int, device: str) -> None:
    case = Case(op, BRAIN, dropout_p=0.3)
    given = inputs_of(case, LayerNormShape(9 if E == 40 else 2, E), device)
    every, names = run("cuda", case, given), GRADIENTS[op]
    for wanted in range(1 << len(names)):
        needs = tuple(bool(wanted >> bit & 1) for bit in range(len(names)))
        some = run("cuda", case, given, needs)
        for need, name in zip(needs, names, strict=True):
            assert torch.equal(some[name], every[name]) if need else some[name] is None


@pytest.mark.parametrize("op", OPS)
def test_no_rows_give_zero_sums(op: str, device: str) -> None:
    for E in (40, 8200):
        found = run("cuda", Case(op), inputs_of(Case(op), LayerNormShape(0, E), device))
        assert found["y"].shape == found["dx"].shape == (0, E)
        assert torch.equal(found["dweight"], torch.zeros(E, device=device))


def test_a_nan_stays_in_its_row_and_its_column_sums(device: str) -> None:
    case = Case("layer_norm")
    given = inputs_of(case, LayerNormShape(9, 40), device)
    given.x[4, 7] = torch.nan
    found = run("cuda", case, given)
    others = torch.arange(9) != 4
    for name in ("y", "dx"):
        assert found[name][4].isnan().all()
        assert found[name][others].isfinite().all()
    assert found["dweight"].isnan().all()
    assert found["dbias"].isfinite().all()


@pytest.mark.parametrize("E", [768, 16392])
def test_variance_survives_a_mean_far_from_zero(E: int, device: str) -> None:
    case = Case("layer_norm")
    x = layer_norm_inputs(LayerNormShape(5, E), mean=1e4, device=device)[0]
    assert_close(case, replace(inputs_of(case, LayerNormShape(5, E), device), x=x))


# More chunks than a group of them has: of a block, of a cluster, and of a part of the columns.
@pytest.mark.parametrize(("R", "E", "clusters"), [(37, 40, True), (17, 8200, True), (18, 8200, False)])
def test_sums_are_the_same_whichever_block_ends_last(
    R: int, E: int, clusters: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda":
        pytest.skip("only the emulator can be told an order")
    monkeypatch.setattr(cuda_call, "processors", lambda device: 37)
    monkeypatch.setattr(norm_cuda, "_MIN_CHUNK_ROWS", 1)
    if not clusters:
        monkeypatch.setenv("CUDA_EMULATOR_NO_CLUSTERS", "1")
    case = Case("layer_norm", BRAIN, parameters=SINGLE)
    given = inputs_of(case, LayerNormShape(R, E), device)
    assert_close(case, given)
    found = run("cuda", case, given)
    monkeypatch.setenv("CUDA_EMULATOR_LAST_BLOCK_FIRST", "1")
    for name, result in run("cuda", case, given).items():
        assert torch.equal(result, found[name]), name


@pytest.mark.parametrize("shape", [(40, 40), (64, 768), (8, 9001), (8, 9000)], ids=str)
def test_repeats_are_bit_equal(shape: tuple[int, int], device: str) -> None:
    R, E = shape
    rows = R * 100 if device == "cuda" else R
    case = Case("add_norm", BRAIN, dropout_p=0.3)
    given = inputs_of(case, LayerNormShape(rows, E), device)
    first = run("cuda", case, given)
    for _ in range(10 if device == "cuda" else 1):
        for name, result in run("cuda", case, given).items():
            assert torch.equal(result, first[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(cuda_call.unavailable() is not None, reason=str(cuda_call.unavailable()))
class TestOnAGpu:
    """What there is nothing of on the CPU: streams, devices, graphs."""

    CASE = Case("add_norm", BRAIN, dropout_p=0.3)

    def test_kernels_run_on_the_current_stream(self) -> None:
        given = inputs_of(self.CASE, LayerNormShape(4096, 768), "cuda")
        expected = run("cuda", self.CASE, replace(given, x=given.x * 3))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # A kernel on another stream would read x before it is multiplied.
            torch.cuda._sleep(20_000_000)
            found = run("cuda", self.CASE, replace(given, x=given.x.mul_(3)))
        stream.synchronize()
        assert all(torch.equal(result, expected[name]) for name, result in found.items())

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_kernels_run_on_the_device_of_x(self) -> None:
        given = inputs_of(self.CASE, LayerNormShape(37, 768), "cuda:1")
        with torch.cuda.device(0):
            found = run("cuda", self.CASE, given)
            assert torch.cuda.current_device() == 0
        there = run("cuda", self.CASE, given.each(lambda x: x.to("cuda:0")))
        for name, result in found.items():
            assert result.device.index == 1
            torch.testing.assert_close(result, there[name], check_device=False)

    def test_a_captured_graph_replays_with_another_seed(self) -> None:
        given = inputs_of(self.CASE, LayerNormShape(37, 768), "cuda")
        kernels = backends.load("add_norm", "cuda")
        seed = torch.tensor(1, device="cuda")
        options = Options(True, EPS, 0.0, 0.3, seed)
        arguments = given.x, given.residual, given.weight, given.bias, options
        kernels.forward(*arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, *_ = kernels.forward(*arguments)
        seed.fill_(2)
        graph.replay()
        assert torch.equal(y, kernels.forward(*arguments)[0])

    @pytest.mark.parametrize("E", [768, 8200])
    def test_a_captured_backward_replays_with_the_same_bits(self, E: int) -> None:
        given = inputs_of(self.CASE, LayerNormShape(600, E), "cuda")
        kernels = backends.load("add_norm", "cuda")
        options = Options(True, EPS, 0.0, 0.3, torch.tensor(1, device="cuda"))
        _, h, mean, rstd = kernels.forward(given.x, given.residual, given.weight, given.bias, options)
        arguments = given.dy, given.dh, h, given.weight, mean, rstd, options
        expected = kernels.backward(*arguments, needs=(True,) * 4)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = kernels.backward(*arguments, needs=(True,) * 4)
        for _ in range(3):
            for result in found:
                result.fill_(torch.nan)
            graph.replay()
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))

    def test_ops_reach_the_kernels_by_name(self) -> None:
        x, weight, bias, dy = layer_norm_inputs(LayerNormShape(12, 96), device="cuda")
        for call in (
            lambda x, w, b, backend: lmkern.layer_norm(x, (96,), w, b, backend=backend),
            lambda x, w, b, backend: lmkern.rms_norm(x, (96,), w, backend=backend),
            lambda x, w, b, backend: lmkern.add_norm(x, x, w, b, backend=backend)[0],
        ):
            results = []
            for backend in ("cuda", "reference"):
                leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
                y = call(*leaves, backend)
                y.backward(dy)
                results.append((y.detach(), *(leaf.grad for leaf in leaves)))
            for one, other in zip(*results, strict=True):
                torch.testing.assert_close(one, other)
