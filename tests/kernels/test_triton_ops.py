"""The Triton kernels of the row-wise ops in Triton's interpreter: any shape and any features, against the
reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import lmkern
from lmkern.kernels import backends, checked, norm_triton, triton_runtime
from lmkern.kernels.activation import FUNCTIONS
from lmkern.kernels.add_norm import Options
from lmkern.testing import Target, poisoned_memory

pytestmark = pytest.mark.skipif(
    not triton_runtime.interpreted(), reason="needs TRITON_INTERPRET=1 (make test sets it)"
)

# Relative to the largest element of the exact result: a few roundings of the format.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}

Draw = Callable[[st.SearchStrategy[Any]], Any]
Results = list[Tensor | None]
# A call of the op's kernels on a backend: inputs are float64 for the reference.
Call = Callable[[Any, Callable[[Tensor | None], Tensor | None]], Results]

WIDTHS = st.one_of(st.integers(1, 40), st.sampled_from([64, 129, 257]))
FLAGS = st.booleans()


class Inputs:
    """Tensors of drawn shapes and strides, the same for each seed."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.dtype = draw(st.sampled_from(list(TOLERANCE)))
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(dtype or self.dtype)

    def rows(self, R: int, E: int, dtype: torch.dtype | None = None) -> Tensor:
        """(R, E) with a row stride of its own."""
        gap = self.draw(st.sampled_from([0, 0, 3]))
        return self.randn(R, E + gap, dtype=dtype)[:, gap:]

    def integers(self, count: int, *shape: int) -> Tensor:
        return torch.randint(count, shape, generator=self.generator)

    def maybe(self, tensor: Tensor) -> Tensor | None:
        return tensor if self.draw(FLAGS) else None

    def needs(self, *possible: bool) -> tuple[bool, ...]:
        return tuple(able and self.draw(FLAGS) for able in possible)


def norm(inputs: Inputs, centred: bool) -> Call:
    R, E = inputs.draw(st.integers(0, 30)), inputs.draw(WIDTHS)
    x, dy = inputs.rows(R, E), inputs.rows(R, E)
    parameter_dtype = inputs.draw(st.sampled_from([inputs.dtype, inputs.wide]))
    weight = inputs.maybe(inputs.randn(E, dtype=parameter_dtype))
    bias = inputs.maybe(inputs.randn(E, dtype=parameter_dtype)) if centred else None
    needs = inputs.needs(True, True, centred)
    offset = inputs.draw(st.sampled_from([0.0, 1.0]))

    def layer_norm(kernel: Any, to: Callable[[Tensor | None], Any]) -> Results:
        y, mean, rstd = kernel.forward(to(x), to(weight), to(bias), eps=1e-5)
        return [y, mean, rstd, *kernel.backward(to(dy), to(x), to(weight), mean, rstd, needs=needs)]

    def rms_norm(kernel: Any, to: Callable[[Tensor | None], Any]) -> Results:
        y, rstd = kernel.forward(to(x), to(weight), eps=1e-5, offset=offset)
        gradients = kernel.backward(to(dy), to(x), to(weight), rstd, offset=offset, needs=needs[:2])
        return [y, rstd, *gradients]

    return layer_norm if centred else rms_norm


def add_norm(inputs: Inputs) -> Call:
    R, E = inputs.draw(st.integers(0, 20)), inputs.draw(WIDTHS)
    centred = inputs.draw(FLAGS)
    residual_dtype = inputs.draw(st.sampled_from([inputs.dtype, inputs.wide]))
    x, dy = inputs.rows(R, E), inputs.rows(R, E)
    residual = inputs.rows(R, E, residual_dtype)
    dh = inputs.maybe(inputs.rows(R, E, residual_dtype))
    weight = inputs.maybe(inputs.randn(E))
    bias = inputs.maybe(inputs.randn(E)) if centred else None
    options = Options(
        centred, 1e-3, inputs.draw(st.sampled_from([0.0, 1.0])), inputs.draw(st.sampled_from([0.0, 0.3])),
        torch.tensor(inputs.draw(st.integers(-(2**63), 2**63 - 1))),
    )  # fmt: skip
    needs = inputs.needs(True, True, True, centred)

    def call(kernel: Any, to: Callable[[Tensor | None], Any]) -> Results:
        y, h, mean, rstd = kernel.forward(to(x), to(residual), to(weight), to(bias), options)
        gradients = kernel.backward(to(dy), to(dh), h, to(weight), mean, rstd, options, needs=needs)
        return [y, h, mean, rstd, *gradients]

    return call


def loss_options(inputs: Inputs) -> dict[str, Any]:
    return {
        "ignore_index": inputs.draw(st.sampled_from([-100, 0])),
        "label_smoothing": inputs.draw(st.sampled_from([0.0, 0.2])),
        "z_loss": inputs.draw(st.sampled_from([0.0, 0.01])),
        "softcap": inputs.draw(st.sampled_from([0.0, 2.0])),
    }


def cross_entropy(inputs: Inputs) -> Call:
    R, V = inputs.draw(st.integers(0, 8)), inputs.draw(WIDTHS)
    logits, targets, dloss = inputs.rows(R, V), inputs.integers(V, R), inputs.randn(R, dtype=inputs.wide)
    options = loss_options(inputs)

    def call(kernel: Any, to: Callable[[Tensor | None], Any]) -> Results:
        loss, *statistics = kernel.forward(to(logits), targets, **options)
        return [loss, *statistics, kernel.backward(to(dloss), to(logits), targets, *statistics, **options)]

    return call


def linear_cross_entropy(inputs: Inputs) -> Call:
    R, V, E = inputs.draw(st.integers(0, 8)), inputs.draw(WIDTHS), inputs.draw(st.integers(1, 20))
    x, weight, bias = inputs.rows(R, E), inputs.rows(V, E), inputs.maybe(inputs.randn(V))
    targets, dloss = inputs.integers(V, R), inputs.randn(R, dtype=inputs.wide)
    options, needs = loss_options(inputs), inputs.needs(True, True, bias is not None)

    def call(kernel: Any, to: Callable[[Tensor | None], Any]) -> Results:
        arguments = to(x), to(weight), to(bias), targets
        return [*kernel.forward(*arguments, to(dloss), needs=needs, **options)]

    return call


def rotary(inputs: Inputs) -> Call:
    B, H, N, D = (inputs.draw(st.integers(1, most)) for most in (2, 3, 9, 20))
    pairs = inputs.draw(st.integers(0, D // 2))
    dims = inputs.draw(st.permutations(range(4)))
    sizes = (B, H, N, D)
    x = inputs.randn(*(sizes[dim] for dim in dims)).permute(*(dims.index(dim) for dim in range(4)))
    angles = inputs.randn(N + 4, pairs, dtype=torch.float32)
    positions = inputs.maybe(inputs.integers(N + 4, B, N))
    options = {
        "offset": 0 if positions is not None else inputs.draw(st.integers(0, 4)),
        "interleaved": inputs.draw(FLAGS),
        "inverse": inputs.draw(FLAGS),
    }

    def call(kernel: Any, to: Callable[[Tensor | None], Any]) -> Results:
        tables = angles.cos(), angles.sin(), positions
        y = kernel.forward(to(x), *tables, inplace=False, **options)
        mine = to(x).clone()
        assert kernel.forward(mine, *tables, inplace=True, **options) is mine
        return [y, mine, kernel.backward(to(x), *tables, **options)]

    return call


def activation(inputs: Inputs) -> Call:
    R, F, gated = inputs.draw(st.integers(0, 30)), inputs.draw(WIDTHS), inputs.draw(FLAGS)
    width = 2 * F if gated else F
    x, dy = inputs.rows(R, width), inputs.rows(R, F)
    bias = inputs.maybe(inputs.randn(width, dtype=inputs.wide))
    options = {"function": inputs.draw(st.sampled_from(FUNCTIONS)), "gated": gated}
    needs = inputs.needs(True, bias is not None)

    def call(kernel: Any, to: Callable[[Tensor | None], Any]) -> Results:
        y = kernel.forward(to(x), to(bias), **options)
        return [y, *kernel.backward(to(dy), to(x), to(bias), needs=needs, **options)]

    return call


def embedding(inputs: Inputs) -> Call:
    N, V, E = inputs.draw(st.integers(0, 40)), inputs.draw(st.integers(1, 8)), inputs.draw(WIDTHS)
    tokens, weight, dy = inputs.integers(V, N), inputs.randn(V, E), inputs.rows(N, E)
    padding_idx = inputs.draw(st.sampled_from([-1, 0]))

    def call(kernel: Any, to: Callable[[Tensor | None], Any]) -> Results:
        y = kernel.forward(tokens, to(weight))
        return [y, kernel.backward(to(dy), tokens, vocabulary=V, padding_idx=padding_idx)]

    return call


def adamw(inputs: Inputs) -> Call:
    count = inputs.draw(st.integers(0, 2000))
    param, grad = inputs.randn(count), inputs.randn(count)
    average, square = inputs.randn(count, dtype=inputs.wide), inputs.randn(count, dtype=inputs.wide).square()
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.1, "grad_scale": 0.5}

    def call(kernel: Any, to: Callable[[Tensor | None], Any]) -> Results:
        state = [to(param).clone(), to(average).clone(), to(square).clone()]
        kernel.step(state[0], to(grad), *state[1:], None, step=3, **options)
        return [*state]

    return call


CALLS: dict[str, Callable[[Inputs], Call]] = {
    "layer_norm": lambda inputs: norm(inputs, True),
    "rms_norm": lambda inputs: norm(inputs, False),
    "add_norm": add_norm,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "rotary": rotary,
    "activation": activation,
    "embedding": embedding,
    "adamw": adamw,
}


def assert_close(name: str, actual: Tensor | None, exact: Tensor | None, tolerance: float) -> None:
    assert (actual is None) == (exact is None), name
    if actual is None or exact is None:
        return
    assert actual.shape == exact.shape, name
    size = max(1.0, float(exact.abs().nan_to_num().max())) if exact.numel() else 1.0
    torch.testing.assert_close(
        actual.double(), exact.double(), rtol=0, atol=tolerance * size, equal_nan=True, msg=name
    )


@pytest.mark.parametrize("op", CALLS)
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)
@hypothesis.given(data=st.data())
def test_any_shape_and_features_match_the_reference_in_float64(op: str, data: st.DataObject) -> None:
    inputs = Inputs(data.draw)
    call = CALLS[op](inputs)
    kernel, reference = (backends.load(op, backend) for backend in ("triton", "reference"))
    with Target(op, "triton").active(), poisoned_memory():
        mine = call(kernel, lambda tensor: tensor)
    exact = call(reference, lambda tensor: None if tensor is None else tensor.double())
    for i, (actual, expected) in enumerate(zip(mine, exact, strict=True)):
        assert_close(f"{op}: result {i}", actual, expected, TOLERANCE[inputs.dtype])


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(
    "E", [norm_triton.MAX_FUSED_WIDTH + 3, norm_triton.MAX_WIDTH, norm_triton.MAX_WIDTH + 4097]
)
def test_rows_that_registers_do_not_hold(E: int, centred: bool, dropout_p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual, dy, dh = (torch.randn(2, E, generator=generator) for _ in range(4))
    # A mean that would swallow the variance, were it not taken about the mean.
    residual += 300.0
    weight, bias = torch.randn(2, E, generator=generator)
    options = Options(centred, 1e-5, 1.0, dropout_p, torch.tensor(3))
    results = []
    for backend, to in (("triton", Tensor.float), ("reference", Tensor.double)):
        kernel = backends.load("add_norm", backend)
        parameters = to(weight), to(bias) if centred else None
        with Target("add_norm", "triton").active(), poisoned_memory():
            y, h, mean, rstd = kernel.forward(to(x), to(residual), *parameters, options)
            gradients = kernel.backward(
                to(dy), to(dh), h, parameters[0], mean, rstd, options, needs=(True, True, True, centred)
            )
            again = kernel.backward(
                to(dy), to(dh), h, parameters[0], mean, rstd, options, needs=(True, False, False, False)
            )
        results.append([y, rstd, *gradients, again[0]])
    for i, (actual, expected) in enumerate(zip(*results, strict=True)):
        assert_close(f"result {i}", actual, expected, 1e-4)


@pytest.mark.parametrize("op", ["cross_entropy", "embedding", "rotary"])
def test_an_index_out_of_range_gives_nan_where_nobody_looks(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("lmkern.kernels.embedding.triton"), "check_range", lambda *_: None)
    monkeypatch.setattr(import_module("lmkern.ops.rotary"), "checked", lambda _: False)
    monkeypatch.setattr(import_module("lmkern.ops.losses"), "checked", lambda _: False)
    bad = torch.tensor([1, 7, -1, 2**40])
    with Target(op, "triton").active():
        if op == "cross_entropy":
            logits = torch.zeros(4, 5, requires_grad=True)
            found = lmkern.cross_entropy(logits, bad, reduction="none", backend="triton")
            found.sum().backward()
            assert logits.grad.isfinite().all()
        elif op == "embedding":
            weight = torch.zeros(5, 3, requires_grad=True)
            found = lmkern.embedding(bad, weight, backend="triton").sum(1)
            found.sum().backward()
            assert torch.equal(weight.grad.sum(1), torch.tensor([0.0, 3, 0, 0, 0]))
        else:
            tables = torch.zeros(5, 2), torch.zeros(5, 2)
            x = torch.zeros(1, 1, 4, 4)
            found = lmkern.rotary(x, *tables, positions=bad[None], backend="triton").sum((0, 1, 3))
    assert found.isnan().tolist() == [False, True, True, True]


@pytest.mark.parametrize("ends", [[0, 9, 500], [-40, 9, 20], [0, 15, 3]], ids=str)
def test_documents_out_of_range_reach_nothing_beyond_the_tensors(
    ends: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a program that looked at cu_seqlens would refuse; the interpreter would read what lies around."""
    monkeypatch.setattr(import_module("lmkern.ops.attention_checks"), "checked", lambda _: False)
    around = torch.full((3, 64, 8), torch.nan)
    around[:, 22:42] = torch.randn(3, 20, 8)
    q, k, v = (x[None, None, 22:42].requires_grad_() for x in around)
    relative = torch.zeros(1, 39, requires_grad=True)
    with Target("attention", "triton").active(), poisoned_memory():
        options = {"cu_seqlens": torch.tensor(ends), "relative_bias": relative, "backend": "triton"}
        out = lmkern.attention(q, k, v, causal=True, **options)
        seen = out.isfinite()
        dq, dk, dv, drelative = torch.autograd.grad(out, (q, k, v, relative), seen.float())
    # What belongs to no document is not written, and is NaN here; nothing else may be.
    assert drelative.isfinite().all()
    assert torch.equal(seen.all(-1), seen.any(-1))
    for gradient in (dq, dk, dv):
        assert torch.equal(gradient.isfinite().all(-1), gradient.isfinite().any(-1))


def test_indices_on_a_gpu_are_looked_at_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    index = torch.empty(1, device="meta")
    monkeypatch.setenv("LMKERN_CHECKED", "1")
    assert checked.checked(index)
    monkeypatch.delenv("LMKERN_CHECKED")
    assert not checked.checked(index)
    assert checked.checked(torch.zeros(1))
    with pytest.raises(IndexError, match=r"embedding: tokens must lie in \[0, 3\); got 0 to 3"):
        checked.check_range("embedding", "tokens", torch.tensor([0, 3]), 3)
