"""The CUDA kernels of layer norm on a GPU: what RUN_ON_HARDWARE in the backend's cuda.py stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lmkern
from lmkern.kernels import cuda_call
from lmkern.kernels.layer_norm import cuda, reference
from lmkern.testing import (
    LAYER_NORM_SHAPES,
    Errors,
    LayerNormShape,
    layer_norm_inputs,
    mean_over_budget,
    measure,
    over_budget,
    poisoned_memory,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda_call.unavailable() is not None, reason=str(cuda_call.unavailable())),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("y", "mean", "rstd", "dx", "dweight", "dbias")
# Where another kernel takes over, and more rows than the blocks of any GPU take at once.
BORDERS = (256, 264, 4096, 4097, 8192, 8200, 32768, 32776)
SHAPES = (*LAYER_NORM_SHAPES, *(LayerNormShape(3, E) for E in BORDERS), LayerNormShape(30_000, 72))


def run(x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor) -> tuple[Tensor | None, ...]:
    """y, mean, rstd, dx, dweight, dbias from memory that was NaN before."""
    with poisoned_memory():
        y, mean, rstd = cuda.forward(x, weight, bias, eps=1e-5)
        return y, mean, rstd, *cuda.backward(dy, x, weight, mean, rstd, needs=(True, True, True))


def torchs(x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor) -> dict[str, Tensor]:
    """torch's own results in x's dtype."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    y = torch.nn.functional.layer_norm(leaves[0], x.shape[1:], leaves[1], leaves[2], 1e-5)
    y.backward(dy)
    grads = [None if leaf is None else leaf.grad for leaf in leaves]
    return dict(zip(("y", "dx", "dweight", "dbias"), (y.detach(), *grads), strict=True))


def errors(x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor) -> dict[str, Errors]:
    """Against float64, beside torch's."""
    wide = [None if tensor is None else tensor.double() for tensor in (x, weight, bias, dy)]
    exact = dict(zip(NAMES, (*reference.forward(*wide[:3], eps=1e-5), None, None, None), strict=True))
    statistics = (exact["mean"], exact["rstd"])
    gradients = reference.backward(wide[3], wide[0], wide[1], *statistics, needs=(True, True, True))
    exact |= dict(zip(NAMES[3:], gradients, strict=True))
    ours, theirs = dict(zip(NAMES, run(x, weight, bias, dy), strict=True)), torchs(x, weight, bias, dy)
    size = float(dy.abs().max()) if dy.numel() else 0.0
    return {
        # The kernel leaves dweight and dbias in float32; torch rounds them to the parameter's dtype.
        name: measure(
            ours[name].to(result.dtype), result, exact[name], at_least=size if name == "dx" else 0.0
        )
        for name, result in theirs.items()
        if result is not None
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_are_within_torchs_on_every_shape(dtype: torch.dtype) -> None:
    found: dict[str, list[Errors]] = {}
    for shape in SHAPES:
        for name, one in errors(*layer_norm_inputs(shape, dtype, device="cuda")).items():
            assert not (reason := over_budget(f"{name} at {shape}", one)), reason
            found.setdefault(name, []).append(one)
    for name, every in found.items():
        assert not (reason := mean_over_budget(name, every)), reason


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_float32_parameters_beside_a_16_bit_x(dtype: torch.dtype) -> None:
    inputs = layer_norm_inputs(LayerNormShape(37, 768), dtype, parameter_dtype=torch.float32, device="cuda")
    ours = run(*inputs)
    exact = reference.forward(*(tensor.double() for tensor in inputs[:3]), eps=1e-5)
    assert not over_budget("y", measure(ours[0], reference.forward(*inputs[:3], eps=1e-5)[0], exact[0]))


@pytest.mark.parametrize(
    "shape", [LayerNormShape(1000, 40), LayerNormShape(4096, 768), LayerNormShape(300, 9001)], ids=str
)
def test_repeats_are_bit_equal(shape: LayerNormShape) -> None:
    inputs = layer_norm_inputs(shape, torch.bfloat16, device="cuda")
    first = run(*inputs)
    for _ in range(10):
        assert all(torch.equal(one, other) for one, other in zip(first, run(*inputs), strict=True))


def test_rows_apart_and_unaligned_give_the_results_of_contiguous_ones() -> None:
    x, weight, bias, dy = layer_norm_inputs(LayerNormShape(50, 800), torch.bfloat16, device="cuda")
    for offset in (0, 1, 8):
        columns = slice(offset, offset + 768)
        parts = x[:, columns], weight[columns], bias[columns], dy[:, columns]
        whole = run(*(part.clone() for part in parts))
        for one, other in zip(run(*parts), whole, strict=True):
            torch.testing.assert_close(one, other)


def test_no_rows_and_no_parameters() -> None:
    x = torch.empty(0, 40, device="cuda")
    y, _, _, dx, dweight, dbias = run(x, None, None, x)
    assert y.shape == dx.shape == (0, 40)
    assert not dweight.any()
    assert not dbias.any()


def test_kernels_run_on_the_current_stream() -> None:
    x, weight, bias, dy = layer_norm_inputs(LayerNormShape(4096, 768), device="cuda")
    expected = run(x * 3, weight, bias, dy)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # A kernel on another stream would read x before it is multiplied.
        torch.cuda._sleep(20_000_000)
        found = run(x.mul_(3), weight, bias, dy)
    stream.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_device_of_x() -> None:
    inputs = layer_norm_inputs(LayerNormShape(37, 768), device="cuda:1")
    with torch.cuda.device(0):
        found = run(*inputs)
        assert torch.cuda.current_device() == 0
    for one, other in zip(found, run(*(tensor.to("cuda:0") for tensor in inputs)), strict=True):
        assert one.device.index == 1
        torch.testing.assert_close(one, other, check_device=False)


def test_a_captured_graph_replays() -> None:
    inputs = layer_norm_inputs(LayerNormShape(37, 768), torch.bfloat16, device="cuda")
    weight, bias = inputs[1:3]
    expected = cuda.forward(*inputs[:3], eps=1e-5)[0]
    x = torch.zeros_like(inputs[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _, _ = cuda.forward(x, weight, bias, eps=1e-5)
    x.copy_(inputs[0])
    graph.replay()
    assert torch.equal(y, expected)


def test_op_reaches_the_kernels_by_name() -> None:
    x, weight, bias, dy = layer_norm_inputs(LayerNormShape(12, 96), device="cuda")
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    y = lmkern.layer_norm(leaves[0], (96,), *leaves[1:], backend="cuda")
    y.backward(dy)
    for (name, one), leaf in zip(torchs(x, weight, bias, dy).items(), (y, *leaves), strict=True):
        torch.testing.assert_close(leaf.detach() if name == "y" else leaf.grad, one)
