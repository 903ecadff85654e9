"""`lmkern.linear_cross_entropy` on every backend: values, gradients, edges, errors."""

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
from lmkern.kernels import widened
from lmkern.kernels.linear_cross_entropy import cpu, triton
from lmkern.testing import (
    LINEAR_CROSS_ENTROPY_SHAPES,
    Errors,
    LinearCrossEntropyShape,
    Target,
    leaves,
    linear_cross_entropy_inputs,
    mean_verdicts,
    measure,
    poisoned_memory,
    targets,
    verdicts,
)

TARGETS = targets("linear_cross_entropy")
IN_FLOAT32 = [target for target in TARGETS if target.takes(torch.float32)]
# The reference is the formula in torch's own operations: what it must be is right, not better than torch.
KERNELS = [target for target in TARGETS if target.backend != "reference"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RESULTS = ("loss", "dx", "dweight", "dbias")
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "capped": {"softcap": 5.0},
}
SHAPE = LinearCrossEntropyShape(70, 45, 33)


def shape_for(target: Target) -> LinearCrossEntropyShape:
    """SHAPE; of a slow target, of whose kernels a program takes a token, with fewer tokens."""
    return LinearCrossEntropyShape(11, 45, 33) if target.slow else SHAPE


Results = dict[str, Tensor]
Call = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


def results(call: Call, x: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Results:
    """The loss and, for an upstream gradient that is not 1, those of the inputs."""
    x, weight, bias = leaves(x, weight, bias)
    loss = call(x, weight, bias, y)
    dloss = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    gradients = torch.autograd.grad(loss, (x, weight, bias), dloss)
    return dict(zip(RESULTS, (loss.detach(), *gradients), strict=True))


def ours(backend: str | None, **options: Any) -> Call:
    return lambda x, weight, bias, y: lmkern.linear_cross_entropy(
        x, weight, y, bias=bias, backend=backend, **options
    )


def torchs(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, **options: Any) -> Tensor:
    """The same loss in torch's own operations, as one writes it by hand."""
    softcap, z_loss = options.pop("softcap", None), options.pop("z_loss", 0.0)
    logits = F.linear(x, weight, bias)
    if softcap:
        logits = (logits / softcap).tanh() * softcap
    loss = F.cross_entropy(logits, y, **options)
    return loss + z_loss * logits.logsumexp(1).square().mean() if z_loss else loss


@functools.cache
def expected(
    dtype: torch.dtype, shape: LinearCrossEntropyShape, name: str, seed: int = 0
) -> tuple[Results, Results, dict[str, float]]:
    """Torch's results, the same formula's in float64, and the sizes of the terms they are sums of."""
    inputs = linear_cross_entropy_inputs(shape, dtype, seed=seed)
    call = functools.partial(torchs, **OPTIONS[name])
    exact = results(call, *(t.double() if t.is_floating_point() else t for t in inputs))
    x, weight, bias, _ = inputs
    logits = F.linear(x.double(), weight.double(), bias.double())
    return results(call, *inputs), exact, {"loss": float(logits.abs().max())}


@functools.cache
def errors(
    target: Target, dtype: torch.dtype, shape: LinearCrossEntropyShape, name: str, seed: int = 0
) -> dict[str, Errors]:
    theirs, exact, at_least = expected(dtype, shape, name, seed)
    inputs = linear_cross_entropy_inputs(shape, dtype, seed=seed)
    with poisoned_memory(), target.active():
        mine = results(ours(target.backend, **OPTIONS[name]), *inputs)
    return {
        n: measure(mine[n].to(dtype), theirs[n], exact[n], at_least=at_least.get(n, 0.0)) for n in RESULTS
    }


def shapes(target: Target) -> list[LinearCrossEntropyShape]:
    """Triton's interpreter runs a program a row."""
    every = LINEAR_CROSS_ENTROPY_SHAPES
    return [shape for shape in every if shape.R < 100] if target.slow else [*every]


def pairs(among: list[Target], dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[tuple[Target, torch.dtype]]:
    return [(target, dtype) for target in among for dtype in dtypes if target.takes(dtype)]


CASES = [(target, dtype) for target in KERNELS for dtype in target.some(DTYPES, 2) if target.takes(dtype)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("target", "dtype"), CASES, ids=ids)
def test_errors_are_at_most_twice_torchs(target: Target, dtype: torch.dtype, options: str) -> None:
    if dtype == torch.float64:
        for shape in shapes(target):
            with poisoned_memory(), target.active():
                inputs = linear_cross_entropy_inputs(shape, dtype)
                mine = results(ours(target.backend, **OPTIONS[options]), *inputs)
            for result, exact in expected(dtype, shape, options)[1].items():
                torch.testing.assert_close(mine[result], exact, rtol=1e-11, atol=1e-12)
        return
    for shape in shapes(target):
        found = verdicts(functools.partial(errors, target, dtype, shape, options), target.units_beside)
        assert not found, f"{shape}: " + "\n".join(found)


# Three shapes, which is what the interpreter is given, are no mean.
@pytest.mark.parametrize(
    ("target", "dtype"),
    [(target, dtype) for target, dtype in CASES if dtype != torch.float64 and not target.slow],
    ids=ids,
)
def test_errors_over_all_shapes_are_at_most_torchs(target: Target, dtype: torch.dtype) -> None:
    draws = [
        functools.partial(errors, target, dtype, shape, options)
        for shape in shapes(target)
        for options in OPTIONS
    ]
    assert not (found := mean_verdicts(draws, target.units_beside)), "\n".join(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ids)
@pytest.mark.parametrize("target", [target for target in TARGETS if target.backend == "cpu"], ids=str)
def test_errors_are_at_most_twice_torchs_where_torch_has_no_fast_product(
    target: Target, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu.bf16, "usable", lambda x: False)
    monkeypatch.setattr(cpu, "torch_multiplies", lambda dtype: False)
    monkeypatch.setattr(widened, "_ROWS", 16)
    monkeypatch.setattr(torch, "mm", None)  # of 16 bits, which this must not call
    draw = functools.partial(errors.__wrapped__, target, dtype, SHAPE, "mean")
    assert not (found := verdicts(draw, target.units_beside)), "\n".join(found)


@pytest.mark.parametrize(("target", "dtype"), pairs(KERNELS), ids=ids)
def test_chunks_change_nothing_but_rounding(
    target: Target, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = LinearCrossEntropyShape(300, 45, 40)
    inputs = linear_cross_entropy_inputs(shape, dtype)
    with target.active(), poisoned_memory():
        whole = results(ours(target.backend), *inputs)
        monkeypatch.setattr(cpu, "_CHUNK_BYTES", 1)
        monkeypatch.setattr(cpu, "_CHUNK_TOKENS", 64)
        monkeypatch.setattr(triton, "CHUNK_BYTES", 1)
        monkeypatch.setattr(widened, "_ROWS", 16)
        assert cpu._chunk_tokens(300, 45) == 64
        assert triton.chunk_tokens(300, 45) == 128
        parts = results(ours(target.backend), *inputs)
    for result, value in parts.items():
        unit = float(whole[result].abs().max()) * torch.finfo(value.dtype).eps
        torch.testing.assert_close(value, whole[result], rtol=0, atol=4 * unit)


@pytest.mark.parametrize("needs", range(8))
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_gradients_do_not_depend_on_which_are_wanted(target: Target, reduction: str, needs: int) -> None:
    *inputs, y = linear_cross_entropy_inputs(shape_for(target), torch.bfloat16)
    with target.active(), poisoned_memory():
        call = ours(target.backend, reduction=reduction)
        everything = results(call, *inputs, y)
        wanted = [bool(needs >> i & 1) for i in range(3)]
        arguments = [x.clone().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
        loss = call(*arguments, y)
        assert torch.equal(loss, everything["loss"])
        if needs:
            loss.backward(torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape))
    for x, want, result in zip(arguments, wanted, RESULTS[1:], strict=True):
        assert (x.grad is not None) == want
        if want:
            assert torch.equal(x.grad, everything[result])


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_float16_sums_over_tokens_may_pass_its_largest_number(target: Target) -> None:
    # Each token adds about 8 x 0.9 to a gradient: 12,000 of them over 65,504, the mean far below.
    tokens = 12_000
    x, weight, bias = torch.full((tokens, 1), 8.0), torch.zeros(10, 1), torch.zeros(10)
    inputs = leaves(*(t.half() for t in (x, weight, bias)))
    with target.active():
        loss = lmkern.linear_cross_entropy(
            inputs[0],
            inputs[1],
            torch.zeros(tokens, dtype=torch.int64),
            bias=inputs[2],
            backend=target.backend,
        )
        ours = torch.autograd.grad(loss, inputs)
    expected = torch.full((10, 1), 0.8)
    expected[0] -= 8
    assert ours[1].dtype == ours[2].dtype == torch.float16
    torch.testing.assert_close(ours[1].float(), expected, rtol=2e-3, atol=0)
    torch.testing.assert_close(ours[2].float(), expected[:, 0] / 8, rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_backward_twice_gives_the_same_twice(target: Target, reduction: str, dtype: torch.dtype) -> None:
    x, weight, bias, y = linear_cross_entropy_inputs(shape_for(target), dtype)
    x, weight, bias = leaves(x, weight, bias)
    with target.active():
        loss = lmkern.linear_cross_entropy(
            x, weight, y, bias=bias, reduction=reduction, backend=target.backend
        ).sum()
        for factor in (1.0, 0.3, 1.0):
            first = torch.autograd.grad(loss * factor, (x, weight, bias), retain_graph=True)
            kept = [gradient.clone() for gradient in first]
            second = torch.autograd.grad(loss * factor, (x, weight, bias), retain_graph=True)
            for mine, before, again in zip(first, kept, second, strict=True):
                # What was given away is the caller's.
                assert torch.equal(mine, before)
                assert torch.equal(again, before)
        loss.backward(retain_graph=True)
        once = weight.grad.clone()
        loss.backward()
    assert torch.equal(weight.grad, once + once)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sliced rows": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "offset by an element": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
    "transposed": lambda x: x.mT.contiguous().mT,
    "every second element": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one row for all": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("target", "dtype"), pairs(TARGETS, (torch.float32, torch.bfloat16)), ids=ids)
def test_strides_are_free(target: Target, dtype: torch.dtype, layout: str) -> None:
    x, weight, bias, y = linear_cross_entropy_inputs(SHAPE, dtype)
    lay = LAYOUTS[layout]
    with target.active(), poisoned_memory():
        mine = results(
            ours(target.backend),
            lay(x),
            lay(weight),
            bias.repeat_interleave(2)[::2],
            y.repeat_interleave(2)[::2],
        )
        right = results(ours(target.backend), lay(x).contiguous(), lay(weight).contiguous(), bias, y)
    for result, value in mine.items():
        # torch's products of other strides may add in another order.
        unit = float(right[result].abs().max()) * torch.finfo(value.dtype).eps
        torch.testing.assert_close(value, right[result], rtol=0, atol=4 * unit)


@pytest.mark.parametrize(("target", "dtype"), pairs(TARGETS), ids=ids)
def test_ignored_tokens_do_not_count(target: Target, dtype: torch.dtype) -> None:
    x, weight, bias, y = linear_cross_entropy_inputs(SHAPE, dtype)
    kept = torch.arange(70) % 3 != 0
    y = y.where(kept, -100)
    x[~kept] = 3.0
    with target.active(), poisoned_memory():
        mine = results(ours(target.backend), x, weight, bias, y)
        right = results(ours(target.backend), x[kept], weight, bias, y[kept])
    assert (mine["dx"][~kept] == 0).all()
    mine["dx"] = mine["dx"][kept]
    for result, value in mine.items():
        unit = float(right[result].abs().max()) * torch.finfo(value.dtype).eps
        torch.testing.assert_close(value, right[result], rtol=0, atol=4 * unit)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("R", [0, 5])
@pytest.mark.parametrize(("target", "dtype"), pairs(TARGETS), ids=ids)
def test_no_token_counts(target: Target, dtype: torch.dtype, R: int, reduction: str) -> None:
    x, weight, bias, y = linear_cross_entropy_inputs(LinearCrossEntropyShape(R, 7, 5), dtype)
    with target.active(), poisoned_memory():
        mine = results(ours(target.backend, reduction=reduction), x, weight, bias, y.fill_(-100))
    loss = mine.pop("loss")
    assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
    for result, shape in (("dx", (R, 5)), ("dweight", (7, 5)), ("dbias", (7,))):
        assert torch.equal(mine[result], torch.zeros(shape, dtype=dtype)), result


def test_width_zero_gives_uniform_weights() -> None:
    y = torch.tensor([0, 2])
    for dtype in DTYPES:
        x, weight = leaves(torch.zeros(2, 0, dtype=dtype), torch.zeros(3, 0, dtype=dtype))
        loss = lmkern.linear_cross_entropy(x, weight, y)
        loss.backward()
        torch.testing.assert_close(loss.double(), torch.tensor(3.0).double().log())
        assert weight.grad.shape == (3, 0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(("target", "dtype"), pairs(TARGETS), ids=ids)
def test_nan_and_infinity_stay_in_their_token(target: Target, dtype: torch.dtype, bad: float) -> None:
    # Where a sum of torch's own bfloat16 product has an odd number of terms, a NaN reaches the row above too.
    x, weight, bias, y = linear_cross_entropy_inputs(LinearCrossEntropyShape(70, 64, 64), dtype)
    call = ours(target.backend, reduction="none")
    with target.active():
        clean = results(call, x, weight, bias, y)
        x[21, 5] = bad
        ill = results(call, x, weight, bias, y)
    for result in ("loss", "dx"):
        assert ill[result][21].isnan().all(), result
        ill[result][21] = clean[result][21]
        torch.testing.assert_close(ill[result], clean[result])
    assert ill["dweight"].isnan().all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("target", [t for t in KERNELS if t.backend == "cpu"], ids=str)
def test_results_are_bit_equal_for_any_number_of_threads(target: Target, threads: int) -> None:
    inputs = linear_cross_entropy_inputs(LinearCrossEntropyShape(300, 1000, 64), torch.bfloat16)
    with target.active():
        right = results(ours(target.backend), *inputs)
        torch.set_num_threads(threads)
        mine = results(ours(target.backend), *inputs)
    for result, value in mine.items():
        assert torch.equal(value, right[result]), result


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_sums_over_many_tokens_stay_exact(target: Target) -> None:
    """Terms of one sign, which sums in bfloat16 would lose beyond 256 of them."""
    tokens = 512 if target.interpreted else 8192
    x = torch.rand(tokens, 16).bfloat16().requires_grad_()
    weight = torch.zeros(8, 16, dtype=torch.bfloat16, requires_grad=True)
    y = torch.zeros(tokens, dtype=torch.int64)
    with target.active():
        lmkern.linear_cross_entropy(x, weight, y, reduction="sum", backend=target.backend).backward()
    right = (torch.full((8,), 1 / 8).double() - F.one_hot(torch.tensor(0), 8))[:, None] * x.double().sum(0)
    assert ((weight.grad.double() - right) / right).abs().max() < 0.005


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_gradcheck(target: Target, options: str) -> None:
    torch.set_num_threads(1)
    x, weight, bias, y = linear_cross_entropy_inputs(LinearCrossEntropyShape(4, 7, 5), torch.float64)
    y[1] = -100
    with target.active():
        assert torch.autograd.gradcheck(
            lambda *a: ours(target.backend, **OPTIONS[options])(*a, y),
            leaves(x, weight, bias),
            fast_mode=target.interpreted,
        )


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.given(
    R=st.integers(0, 70),
    V=st.integers(1, 70),
    E=st.integers(1, 70),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-2]),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    ignored=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
)
@pytest.mark.parametrize("target", KERNELS, ids=str)
def test_any_options_agree_with_the_reference(
    target: Target, R: int, V: int, E: int, ignored: bool, dtype: torch.dtype, **options: Any
) -> None:
    # A program takes a token.
    R = R % 12 if target.slow else R
    *inputs, y = linear_cross_entropy_inputs(LinearCrossEntropyShape(R, V, E), dtype, size=1.0)
    options["ignore_index"] = int(y[0]) if ignored and R else -100
    with target.active(), poisoned_memory():
        mine = results(ours(target.backend, **options), *inputs, y)
        right = results(ours("reference", **options), *inputs, y)
    for result, value in mine.items():
        scale = float(right[result].abs().nan_to_num().max()) if value.numel() else 0.0
        # Logits in bfloat16 of size up to 4 are off by 2^-7, and so are the weights, relatively.
        bound = 1e-11 if dtype == torch.float64 else 0.06
        torch.testing.assert_close(
            value, right[result], rtol=0, atol=bound * max(scale, 1e-3), equal_nan=True
        )


@pytest.mark.parametrize("with_bias", [False, True])
def test_autocast_is_that_of_linear(with_bias: bool) -> None:
    x, weight, bias, y = linear_cross_entropy_inputs(SHAPE)
    parameters = leaves(x, weight, *[bias] * with_bias)
    with torch.autocast("cpu", torch.bfloat16):
        loss = lmkern.linear_cross_entropy(*parameters[:2], y, bias=parameters[2] if with_bias else None)
    gradients = torch.autograd.grad(loss, parameters)
    narrow = leaves(*(p.bfloat16() for p in parameters))
    right = lmkern.linear_cross_entropy(*narrow[:2], y, bias=narrow[2] if with_bias else None)
    assert torch.equal(loss, right)
    for mine, theirs in zip(gradients, torch.autograd.grad(right, narrow), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs.float())


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"targets": torch.tensor([0, 3])}, IndexError, r"targets must lie in \[0, 3\) or .* -100; got 3"),
        ({"targets": torch.zeros(2)}, ValueError, r"targets must be int64, .*got torch.float32 \(2,\)"),
        ({"weight": torch.zeros(3, 5)}, ValueError, r"weight \(V, E\); got \(2, 4\) and \(3, 5\)"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight \(V, E\); got \(2, 4\) and \(4,\)"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must be \(V,\), \(3,\); got \(4,\)"),
        ({"bias": torch.zeros(3).double()}, ValueError, r"share one dtype of float32, .*; cast them first"),
        ({"weight": torch.zeros(3, 4).half()}, ValueError, r"share one dtype .*float32, torch.float16"),
        ({"weight": torch.zeros(3, 4, device="meta")}, ValueError, r"weight must be on x's device cpu; got"),
        ({"reduction": "avg"}, ValueError, r"reduction must be one of mean, sum, none; got 'avg'"),
        ({"backend": "cdua"}, ValueError, r"no backend 'cdua'; expected one of .*reference"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(
    changed: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments = {"x": torch.zeros(2, 4), "weight": torch.zeros(3, 4), "targets": torch.tensor([0, 1])}
    with pytest.raises(error, match=f"linear_cross_entropy: .*{message}"):
        lmkern.linear_cross_entropy(**{**arguments, **changed})
