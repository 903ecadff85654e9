"""`lmkern.cross_entropy` on every backend: values and gradients against the exact ones, edges, errors."""

import functools
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import lmkern
from lmkern.testing import (
    CROSS_ENTROPY_SHAPES,
    CrossEntropyShape,
    Errors,
    Target,
    cross_entropy_inputs,
    leaves,
    mean_verdicts,
    measure,
    poisoned_memory,
    targets,
    verdicts,
)
from lmkern.testing import exact as long_double

TARGETS = targets("cross_entropy")
IN_FLOAT32 = [target for target in TARGETS if target.takes(torch.float32)]
# The reference is the formula in torch's own operations: what it must be is right, not better than torch.
KERNELS = [target for target in TARGETS if target.backend != "reference"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RESULTS = ("loss", "dlogits")
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "capped": {"softcap": 5.0},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 3.0},
}

Results = dict[str, Tensor]


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


def results(call: Callable[[Tensor, Tensor], Tensor], logits: Tensor, y: Tensor, dloss: Tensor) -> Results:
    """The loss of each token and dlogits."""
    (logits,) = leaves(logits)
    loss = call(logits, y)
    (dlogits,) = torch.autograd.grad(loss, logits, dloss.to(loss.dtype))
    return {"loss": loss.detach(), "dlogits": dlogits}


def ours(backend: str, **options: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, y: lmkern.cross_entropy(logits, y, reduction="none", backend=backend, **options)


def torchs(logits: Tensor, y: Tensor, **options: float) -> Tensor:
    """The same loss in torch's own operations, as one writes it by hand."""
    softcap, z_loss = options.get("softcap"), options.get("z_loss", 0.0)
    if softcap:
        logits = (logits / softcap).tanh() * softcap
    loss = F.cross_entropy(logits, y, reduction="none", label_smoothing=options.get("label_smoothing", 0.0))
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(1).square().masked_fill(y == -100, 0)
    return loss


@functools.cache
def expected(
    dtype: torch.dtype, shape: CrossEntropyShape, name: str, seed: int
) -> tuple[Results, dict[str, Any]]:
    """Torch's results and the exact ones."""
    inputs, options = cross_entropy_inputs(shape, dtype, seed=seed), OPTIONS[name]
    right = long_double.cross_entropy(*inputs, **options)
    return results(functools.partial(torchs, **options), *inputs), right


@functools.cache
def errors(
    target: Target, dtype: torch.dtype, shape: CrossEntropyShape, name: str, seed: int = 0
) -> dict[str, Errors]:
    options = OPTIONS[name]
    logits, y, dloss = cross_entropy_inputs(shape, dtype, seed=seed)
    with poisoned_memory(), target.active():
        mine = results(ours(target.backend, **options), logits, y, dloss)
    theirs, right = expected(dtype, shape, name, seed)
    # A gradient is the difference of terms as large as dloss times the weight of a class.
    size = float(dloss.abs().max()) if shape.V <= 2 else 0.0
    at_least = {"dlogits": size, "loss": float(logits.abs().max())}
    return {n: measure(mine[n].to(dtype), theirs[n], right[n], at_least=at_least[n]) for n in RESULTS}


def shapes(target: Target) -> list[CrossEntropyShape]:
    """Triton's interpreter runs a program a row."""
    every = CROSS_ENTROPY_SHAPES
    return [shape for shape in every if shape.R < 20 and shape.V < 5000] if target.slow else [*every]


def pairs(among: list[Target], dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[tuple[Target, torch.dtype]]:
    return [(target, dtype) for target in among for dtype in dtypes if target.takes(dtype)]


CASES = [(target, dtype) for target in KERNELS for dtype in target.some(DTYPES, 2) if target.takes(dtype)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("target", "dtype"), CASES, ids=ids)
def test_errors_are_at_most_twice_torchs(target: Target, dtype: torch.dtype, options: str) -> None:
    for shape in shapes(target):
        found = verdicts(functools.partial(errors, target, dtype, shape, options), target.units_beside)
        assert not found, f"{shape}: " + "\n".join(found)


@pytest.mark.parametrize(("target", "dtype"), CASES, ids=ids)
def test_errors_over_all_shapes_are_at_most_torchs(target: Target, dtype: torch.dtype) -> None:
    draws = [
        functools.partial(errors, target, dtype, shape, options)
        for shape in shapes(target)
        for options in OPTIONS
    ]
    assert not (found := mean_verdicts(draws, target.units_beside)), "\n".join(found)


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_reductions_are_torchs(target: Target, reduction: str, smoothing: float) -> None:
    logits, y, _ = cross_entropy_inputs(CrossEntropyShape(12, 33), torch.float64)
    logits, y = logits.view(3, 4, 33), y.view(3, 4)
    options = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": int(y[0, 0])}
    (a,), (b,) = leaves(logits), leaves(logits)
    with target.active(), poisoned_memory():
        mine = lmkern.cross_entropy(a, y, backend=target.backend, **options)
        mine.square().sum().backward()
    theirs = F.cross_entropy(b.flatten(0, 1), y.flatten(), **options)
    theirs.square().sum().backward()
    assert mine.shape == (y.shape if reduction == "none" else ())
    torch.testing.assert_close(mine.flatten(), theirs.flatten())
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(("target", "dtype"), pairs(TARGETS), ids=ids)
def test_all_ignored_has_no_mean_and_no_gradient(target: Target, dtype: torch.dtype) -> None:
    logits = torch.full((5, 33), torch.nan, dtype=dtype, requires_grad=True)
    y = torch.full((5,), -100)
    with target.active(), poisoned_memory():
        for reduction, expected in (("mean", torch.nan), ("sum", 0.0), ("none", 0.0)):
            loss = lmkern.cross_entropy(logits, y, reduction=reduction, backend=target.backend)
            (dlogits,) = torch.autograd.grad(loss.sum(), logits)
            assert torch.equal(dlogits, torch.zeros_like(dlogits))
            torch.testing.assert_close(loss, torch.full_like(loss, expected), equal_nan=True)


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_no_tokens(target: Target, shape: tuple[int, ...]) -> None:
    logits = torch.empty(*shape, 7, requires_grad=True)
    y = torch.empty(shape, dtype=torch.int64)
    with target.active():
        loss = lmkern.cross_entropy(logits, y, reduction="sum", backend=target.backend)
        loss.backward()
        assert lmkern.cross_entropy(logits, y, backend=target.backend).isnan()
    assert loss == 0
    assert logits.grad.shape == logits.shape


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sliced rows": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "offset by an element": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
    "columns": lambda x: x.mT.contiguous().mT,
    "every second element": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one row for all": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_strides_are_free(target: Target, layout: str) -> None:
    logits, y, dloss = cross_entropy_inputs(CrossEntropyShape(20, 133))
    logits = LAYOUTS[layout](logits)
    with target.active(), poisoned_memory():
        expected = results(ours(target.backend), logits.contiguous(), y, dloss)
        mine = results(ours(target.backend), logits, y.repeat_interleave(2)[::2], dloss)
        for result, value in mine.items():
            assert torch.equal(value, expected[result]), result
        ones = results(ours(target.backend), logits, y, torch.ones(()).expand(20))
        full = results(ours(target.backend), logits, y, torch.ones(20))
    assert torch.equal(ones["dlogits"], full["dlogits"])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("V", [1, 7, 40, 5000])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_nan_and_infinity_stay_in_their_row_and_are_torchs(
    target: Target, V: int, dtype: torch.dtype, bad: float
) -> None:
    logits, y, dloss = cross_entropy_inputs(CrossEntropyShape(6, V), dtype)
    places = {2: 0, 3: V // 2, 4: V - 1}
    with target.active():
        clean = results(ours(target.backend), logits, y, dloss)
        for row, place in places.items():
            logits[row, place] = bad
        logits[5] = bad
        ill = results(ours(target.backend), logits, y, dloss)
    theirs = results(torchs, logits.double(), y, dloss)
    for result in RESULTS:
        assert torch.equal(ill[result][:2], clean[result][:2]), result
        torch.testing.assert_close(ill[result].double(), theirs[result], rtol=2e-2, atol=2e-2, equal_nan=True)


@pytest.mark.parametrize("factor", [1e4, 1e-6])
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_large_and_small_logits(target: Target, factor: float) -> None:
    logits, y, dloss = cross_entropy_inputs(CrossEntropyShape(20, 5000))
    logits = logits * factor
    for options in OPTIONS.values():
        with target.active():
            mine = results(ours(target.backend, **options), logits, y, dloss)
        for result, exact in long_double.cross_entropy(logits, y, dloss, **options).items():
            right = torch.tensor(exact.astype("float64"))
            torch.testing.assert_close(mine[result].double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_what_all_logits_share_costs_no_digits(target: Target) -> None:
    logits, y, dloss = cross_entropy_inputs(CrossEntropyShape(20, 5000))
    logits -= 1e4
    with target.active():
        mine = results(ours(target.backend, label_smoothing=0.1), logits, y, dloss)
    exact = long_double.cross_entropy(logits, y, dloss, label_smoothing=0.1)["loss"]
    torch.testing.assert_close(
        mine["loss"].double(), torch.tensor(exact.astype("float64")), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("target", [t for t in KERNELS if t.backend == "cpu"], ids=str)
def test_results_are_bit_equal_for_any_number_of_threads(target: Target, threads: int) -> None:
    logits, y, _ = cross_entropy_inputs(CrossEntropyShape(40_000, 3))

    def mean() -> tuple[Tensor, Tensor]:
        (x,) = leaves(logits)
        loss = lmkern.cross_entropy(x, y, backend=target.backend)
        return loss.detach(), *torch.autograd.grad(loss, x)

    with target.active():
        expected = mean()
        torch.set_num_threads(threads)
        mine = mean()
    assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_gradcheck(target: Target, options: str) -> None:
    torch.set_num_threads(1)
    (logits,) = leaves(torch.randn(4, 7, dtype=torch.float64))
    y = torch.tensor([3, -100, 0, 6])

    def call(logits: Tensor) -> Tensor:
        return lmkern.cross_entropy(logits, y, reduction="none", backend=target.backend, **OPTIONS[options])

    with target.active():
        assert torch.autograd.gradcheck(call, (logits,), fast_mode=target.interpreted)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
    R=st.integers(0, 5),
    V=st.integers(1, 70),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-2]),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    ignored=st.booleans(),
    seed=st.integers(0, 100),
)
@pytest.mark.parametrize("target", [t for t in KERNELS if t.takes(torch.float32)], ids=str)
def test_any_options_agree_with_the_reference(
    target: Target, R: int, V: int, ignored: bool, seed: int, **options: float
) -> None:
    logits, y, _ = cross_entropy_inputs(CrossEntropyShape(R, V), torch.float64, seed=seed)
    options["ignore_index"] = int(y[0]) if ignored and R else -100
    both = []
    with target.active(), poisoned_memory():
        for backend in (target.backend, "reference"):
            (x,) = leaves(logits)
            loss = lmkern.cross_entropy(x, y, backend=backend, **options)
            both.append((loss.detach(), *torch.autograd.grad(loss.sum(), x)))
    for mine, right in zip(*both, strict=True):
        torch.testing.assert_close(mine, right, equal_nan=True)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"targets": torch.tensor([0, 3])}, IndexError, r"targets must lie in \[0, 3\) or .* -100; got 3"),
        ({"targets": torch.tensor([-1, 0])}, IndexError, r"targets must lie in \[0, 3\) .*; got -1"),
        ({"targets": torch.tensor([-100, 0]), "ignore_index": 1}, IndexError, "ignore_index 1; got -100"),
        ({"targets": torch.zeros(2)}, ValueError, r"targets must be int64, .* \(2,\); got torch.float32"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"one for each row.*got .* \(3,\)"),
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, r"logits must be \(\.\.\., V\) of fl"),
        ({"logits": torch.zeros(())}, ValueError, r"logits must be \(\.\.\., V\)"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must lie in \[0, 1\]; got 1.5"),
        ({"z_loss": -1.0}, ValueError, r"z_loss must be a finite number from 0 up; got -1.0"),
        ({"softcap": -1.0}, ValueError, r"softcap must be above 0, or None or 0 for none; got -1.0"),
        ({"reduction": "avg"}, ValueError, r"reduction must be one of mean, sum, none; got 'avg'"),
        ({"backend": "cdua"}, ValueError, r"no backend 'cdua'; expected one of .*reference"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(
    changed: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments = {"logits": torch.zeros(2, 3), "targets": torch.tensor([0, 1]), **changed}
    with pytest.raises(error, match=f"cross_entropy: .*{message}"):
        lmkern.cross_entropy(**arguments)


def test_out_of_range_is_refused_on_the_registered_path_too() -> None:
    with pytest.raises(IndexError, match=r"cross_entropy: targets must lie in \[0, 3\)"):
        torch.ops.lmkern.cross_entropy(torch.zeros(1, 3), torch.tensor([3]), -100, 0.0, 0.0, 0.0, None)
