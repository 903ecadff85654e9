"""Layer norm's CUDA kernels on the CPU, through tests/csrc/cuda_emulator."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from lmkern.kernels import cuda_call
from lmkern.kernels.layer_norm import cuda, reference
from lmkern.testing import (
    LAYER_NORM_SHAPES,
    LayerNormShape,
    layer_norm_inputs,
    measure,
    over_budget,
    poisoned_memory,
)

# Widths at which another kernel takes over: a pack for each thread of a warp, four packs, a block, memory.
BORDERS = tuple(LayerNormShape(3, E) for E in (128, 132, 256, 264, 4096, 4097, 8192, 8200, 32768, 32776))
SHAPES = LAYER_NORM_SHAPES + BORDERS

ALL = (True, True, True)


@pytest.fixture(autouse=True)
def on_the_cpu(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """lmkern.kernels.layer_norm.cuda takes CPU tensors, on a GPU of three processors."""
    monkeypatch.setattr(cuda_call, "module", lambda: emulated)
    monkeypatch.setattr(cuda_call, "device_and_stream", lambda x: (0, 0))
    monkeypatch.setattr(cuda_call, "processors", lambda device: 3)


def run(
    kernels: ModuleType,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dy: Tensor,
    needs: tuple[bool, ...] = ALL,
) -> tuple[Tensor | None, ...]:
    """y, mean, rstd, dx, dweight, dbias."""
    with poisoned_memory():
        y, mean, rstd = kernels.forward(x, weight, bias, eps=1e-5)
        return y, mean, rstd, *kernels.backward(dy, x, weight, mean, rstd, needs=needs)


def assert_close(x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor) -> None:
    """Against float64, with the reference's error in x's dtype as the measure."""
    wide = [None if tensor is None else tensor.double() for tensor in (x, weight, bias, dy)]
    results = zip(
        ("y", "mean", "rstd", "dx", "dweight", "dbias"),
        run(cuda, x, weight, bias, dy),
        run(reference, x, weight, bias, dy),
        run(reference, *wide),
        strict=True,
    )
    for name, ours, torchs, exact in results:
        # dx is a difference of terms of the size of dy weight rstd.
        size = float(dy.abs().max()) if name == "dx" and dy.numel() else 0.0
        assert not (reason := over_budget(name, measure(ours, torchs, exact, at_least=size))), reason


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_result_matches_float64(shape: LayerNormShape, dtype: torch.dtype) -> None:
    assert_close(*layer_norm_inputs(shape, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("E", [33, 768, 8200])
def test_float32_parameters_beside_a_16_bit_x(E: int, dtype: torch.dtype) -> None:
    assert_close(*layer_norm_inputs(LayerNormShape(19, E), dtype, parameter_dtype=torch.float32))


@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_weight_and_bias_may_be_missing(with_weight: bool, with_bias: bool) -> None:
    x, weight, bias, dy = layer_norm_inputs(LayerNormShape(9, 96), torch.bfloat16)
    assert_close(x, weight if with_weight else None, bias if with_bias else None, dy)


@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("E", [96, 8200])
def test_rows_may_lie_apart_and_off_the_16_byte_grid(offset: int, E: int) -> None:
    x, weight, bias, dy = layer_norm_inputs(LayerNormShape(7, E + 16), torch.bfloat16)
    columns = slice(offset, offset + E)
    assert_close(x[:, columns], weight[:E], bias[:E], dy[:, 8 : 8 + E])
    assert_close(x[:, :E], weight[columns], bias[:E], dy[:, columns])


def test_row_strides_may_be_off_the_16_byte_grid() -> None:
    x, weight, bias, dy = layer_norm_inputs(LayerNormShape(7, 99), torch.bfloat16)
    weight, bias = weight[:96], bias[:96]
    assert_close(x[:, :96], weight, bias, dy[:, :96].clone())
    assert_close(x[:, :96].clone(), weight, bias, dy[:, :96])


@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)], ids=str)
@pytest.mark.parametrize("E", [40, 8200])
def test_only_the_gradients_asked_for_are_computed(needs: tuple[int, int, int], E: int) -> None:
    inputs = layer_norm_inputs(LayerNormShape(9, E), torch.bfloat16)
    some, every = run(cuda, *inputs, tuple(map(bool, needs)))[3:], run(cuda, *inputs)[3:]
    for need, one, whole in zip(needs, some, every, strict=True):
        assert torch.equal(one, whole) if need else one is None


def test_no_rows_give_zero_sums() -> None:
    x, weight, bias, dy = layer_norm_inputs(LayerNormShape(0, 40), torch.bfloat16)
    y, mean, _, dx, dweight, dbias = run(cuda, x, weight, bias, dy)
    assert (y.shape, mean.shape, dx.shape) == ((0, 40), (0,), (0, 40))
    assert torch.equal(dweight, torch.zeros(40))
    assert torch.equal(dbias, torch.zeros(40))


def test_a_nan_stays_in_its_row_and_its_column_sums() -> None:
    x, weight, bias, dy = layer_norm_inputs(LayerNormShape(9, 40), torch.float32)
    x[4, 7] = torch.nan
    y, _, _, dx, dweight, dbias = run(cuda, x, weight, bias, dy)
    others = torch.arange(9) != 4
    assert y[4].isnan().all()
    assert dx[4].isnan().all()
    assert y[others].isfinite().all()
    assert dx[others].isfinite().all()
    assert dweight.isnan().all()
    assert dbias.isfinite().all()


def test_variance_survives_a_mean_far_from_zero() -> None:
    assert_close(*layer_norm_inputs(LayerNormShape(5, 768), torch.float32, mean=1e4))


def test_a_refused_launch_names_the_call(emulated: ModuleType) -> None:
    packed = cuda._PARAMS.pack(*[0] * 11, 40, 40, 3, 40, 0, 0.0, 1, 0, 0, 0, 0)
    with pytest.raises(
        RuntimeError, match=r"layer_norm backward on x \(3, 40\).*bfloat16.*invalid configuration"
    ):
        emulated.layer_norm_backward(packed)
