"""`lmkern.rms_norm` on every backend: values and gradients against the exact ones, edges, errors."""

import functools
import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lmkern
from lmkern.testing import (
    LAYER_NORM_SHAPES,
    Errors,
    LayerNormShape,
    Target,
    layer_norm_inputs,
    leaves,
    mean_verdicts,
    measure,
    poisoned_memory,
    targets,
    verdicts,
)
from lmkern.testing import exact as long_double

TARGETS = targets("rms_norm")
IN_FLOAT32 = [target for target in TARGETS if target.takes(torch.float32)]
# The reference is the formula in torch's own operations: what it must be is right, not better than torch.
KERNELS = [target for target in TARGETS if target.backend != "reference"]
# Of x, and of weight.
DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float64, torch.float64),
)
RESULTS = ("y", "dx", "dweight")
EPS = 1e-6
TARGETS_DTYPES = [
    (target, *dtypes) for target in KERNELS for dtypes in target.some(DTYPES, 2) if target.takes(dtypes[0])
]
CASES = [(*case, shape) for case in TARGETS_DTYPES for shape in case[0].some(LAYER_NORM_SHAPES, 3)]

Call = Callable[[Tensor, Tensor], Tensor]


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


def inputs_of(
    shape: LayerNormShape,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and dy."""
    x, weight, _, dy = layer_norm_inputs(shape, dtype, parameter_dtype=parameter_dtype, seed=seed)
    return x, weight, dy


def ours(backend: str | None, offset: float = 0.0) -> Call:
    return lambda x, weight: lmkern.rms_norm(x, x.shape[-1:], weight, EPS, offset=offset, backend=backend)


def torchs(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), EPS)


def results(call: Call, x: Tensor, weight: Tensor, dy: Tensor) -> dict[str, Tensor]:
    arguments = leaves(x, weight)
    y = call(*arguments)
    return dict(zip(RESULTS, (y.detach(), *torch.autograd.grad(y, arguments, dy)), strict=True))


@functools.cache
def errors(
    target: Target, dtype: torch.dtype, parameter_dtype: torch.dtype, shape: LayerNormShape, seed: int = 0
) -> dict[str, Errors]:
    inputs = x, weight, dy = inputs_of(shape, dtype, parameter_dtype, seed)
    with poisoned_memory(), target.active():
        mine = results(ours(target.backend), *inputs)
    theirs, exact = results(torchs, *inputs), long_double.rms_norm(*inputs, EPS)
    at_least = {}
    if shape.E <= 2:
        # x_hat of one element is 1 or -1, of two it leaves one direction: dx is a difference of such terms.
        rstd = float((x.double().square().mean(1) + EPS).rsqrt().max())
        at_least["dx"] = rstd * float((dy.double() * weight.double()).abs().max())
    return {n: measure(mine[n], theirs[n], exact[n], at_least=at_least.get(n, 0.0)) for n in RESULTS}


@pytest.mark.parametrize(("target", "dtype", "parameter_dtype", "shape"), CASES, ids=ids)
def test_errors_are_at_most_twice_torchs(
    target: Target, dtype: torch.dtype, parameter_dtype: torch.dtype, shape: LayerNormShape
) -> None:
    draw = functools.partial(errors, target, dtype, parameter_dtype, shape)
    found = verdicts(draw, target.units_beside)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("target", "dtype", "parameter_dtype"), TARGETS_DTYPES, ids=ids)
def test_errors_over_all_shapes_are_at_most_torchs(
    target: Target, dtype: torch.dtype, parameter_dtype: torch.dtype
) -> None:
    draws = [
        functools.partial(errors, target, dtype, parameter_dtype, shape)
        for shape in target.some(LAYER_NORM_SHAPES, 3)
    ]
    assert not (found := mean_verdicts(draws, target.units_beside)), "\n".join(found)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_offset_is_added_to_the_weight(target: Target, offset: float) -> None:
    inputs = inputs_of(LayerNormShape(37, 65), torch.float64)
    with target.active(), poisoned_memory():
        mine = results(ours(target.backend, offset), *inputs)
    for name, exact in long_double.rms_norm(*inputs, EPS, offset).items():
        torch.testing.assert_close(mine[name], torch.tensor(exact.astype("float64")), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=ids)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_weight_and_eps_may_be_left_out(target: Target, dtype: torch.dtype) -> None:
    # Small enough that eps decides.
    x, _, dy = inputs_of(LayerNormShape(7, 33), dtype)
    (x,) = leaves(x * 1e-4)
    with target.active(), poisoned_memory():
        y = lmkern.rms_norm(x, (33,), offset=5.0, backend=target.backend)
        (dx,) = torch.autograd.grad(y, x, dy)
    expected = F.rms_norm(x, (33,))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, torch.autograd.grad(expected, x, dy)[0])


@pytest.mark.parametrize("needs", range(1, 4))
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_gradients_do_not_depend_on_which_are_wanted(target: Target, needs: int) -> None:
    *inputs, dy = inputs_of(LayerNormShape(40, 33))
    with target.active(), poisoned_memory():
        everything = results(ours(target.backend), *inputs, dy)
        wanted = [bool(needs >> i & 1) for i in range(2)]
        arguments = [x.clone().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
        ours(target.backend)(*arguments).backward(dy)
    for x, want, result in zip(arguments, wanted, RESULTS[1:], strict=True):
        assert (x.grad is not None) == want
        if want:
            assert torch.equal(x.grad, everything[result])


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_strides_are_free(target: Target) -> None:
    x, weight, dy = inputs_of(LayerNormShape(20, 33))
    call = ours(target.backend)
    with target.active(), poisoned_memory():
        expected = results(call, x, weight, dy)
        for lay in (
            lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
            lambda t: t.mT.contiguous().mT,
            lambda t: t.repeat_interleave(2, 1)[:, ::2],
        ):
            mine = results(call, lay(x), weight.repeat_interleave(2)[::2], lay(dy))
            for result, value in mine.items():
                assert torch.equal(value, expected[result]), result
        ones = torch.ones(())
        assert torch.equal(
            results(call, x, weight, ones.expand(20, 33))["dx"],
            results(call, x, weight, ones.expand(20, 33).contiguous())["dx"],
        )


@pytest.mark.parametrize("lead", [(0,), (2, 0)], ids=str)
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_no_rows(target: Target, lead: tuple[int, ...]) -> None:
    x, weight = torch.empty(*lead, 5), torch.ones(5)
    with target.active(), poisoned_memory():
        mine = results(ours(target.backend), x, weight, torch.empty_like(x))
    assert mine["y"].shape == mine["dx"].shape == x.shape
    assert (mine["dweight"] == 0).all()
    assert lmkern.rms_norm(torch.zeros(3, 0), (0,)).shape == (3, 0)


@pytest.mark.parametrize("normalized", [(5,), (4, 5), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_normalized_shape_of_several_dimensions(target: Target, normalized: tuple[int, ...]) -> None:
    x, weight = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(normalized, dtype=torch.float64)
    with target.active():
        mine = lmkern.rms_norm(x, normalized, weight, backend=target.backend)
    torch.testing.assert_close(mine, F.rms_norm(x, normalized, weight))


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_bfloat16_dweight_over_many_rows_is_within_half_a_percent(target: Target) -> None:
    inputs = inputs_of(LayerNormShape(16_384 if not target.interpreted else 2_048, 48), torch.bfloat16)
    with target.active():
        mine = results(ours(target.backend), *inputs)
    expected = torch.tensor(long_double.rms_norm(*inputs, EPS)["dweight"].astype("float64"))
    assert (mine["dweight"].double() - expected).norm() < 0.005 * expected.norm()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_nan_or_infinity_stays_in_its_row(target: Target, bad: float) -> None:
    x, weight, dy = inputs_of(LayerNormShape(40, 33))
    with target.active():
        clean = results(ours(target.backend), x, weight, dy)
        x[21, 5] = bad
        ill = results(ours(target.backend), x, weight, dy)
    for result in ("y", "dx"):
        assert ill[result][21].isnan().any(), result
        ill[result][21] = clean[result][21]
        assert torch.equal(ill[result], clean[result]), result


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("target", [t for t in TARGETS if t.backend == "cpu"], ids=str)
def test_results_are_bit_equal_for_any_number_of_threads(target: Target, threads: int) -> None:
    inputs = inputs_of(LayerNormShape(1025, 33))
    with target.active():
        expected = results(ours("cpu"), *inputs)
        torch.set_num_threads(threads)
        mine = results(ours("cpu"), *inputs)
    for result, value in mine.items():
        assert torch.equal(value, expected[result]), result


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_gradcheck(target: Target) -> None:
    torch.set_num_threads(1)
    arguments = leaves(*inputs_of(LayerNormShape(3, 5), torch.float64)[:2])
    with target.active():
        assert torch.autograd.gradcheck(ours(target.backend, 1.0), arguments, fast_mode=target.interpreted)


def direct(target: Target) -> Call:
    return ours(target.backend, 1.0)


def registered(target: Target) -> Call:
    return lambda x, weight: torch.ops.lmkern.rms_norm(x, weight, EPS, 1.0, target.backend)[0]


def compiled(target: Target) -> Call:
    return torch.compile(direct(target), fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("path", [registered, compiled])
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_direct_path_is_bit_equal_to_the_others(
    target: Target, parameter_dtype: torch.dtype, path: Callable[[Target], Call]
) -> None:
    torch.compiler.reset()
    inputs = inputs_of(LayerNormShape(20, 33), torch.bfloat16, parameter_dtype)
    with target.active():
        expected = results(direct(target), *inputs)
        mine = results(path(target), *inputs)
    for result, value in expected.items():
        assert torch.equal(value, mine[result]), result
        assert value.dtype == mine[result].dtype


@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_opcheck(target: Target, with_weight: bool) -> None:
    x, weight, dy = inputs_of(LayerNormShape(20, 33))
    parameter = leaves(weight)[0] if with_weight else None
    with target.active():
        torch.library.opcheck(
            torch.ops.lmkern.rms_norm.default, (*leaves(x), parameter, EPS, 1.0, target.backend)
        )
        _, rstd = torch.ops.lmkern.rms_norm(x, weight, EPS, 1.0, target.backend)
        for needs in ([True, with_weight], [False, with_weight]):
            constant = weight if with_weight else None
            arguments = (dy, x, constant, rstd, 1.0, target.backend, needs)
            torch.library.opcheck(torch.ops.lmkern.rms_norm_backward.default, arguments)


@pytest.mark.parametrize("path", [direct, registered, compiled])
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_double_backward_is_refused(target: Target, path: Callable[[Target], Call]) -> None:
    torch.compiler.reset()
    x, weight, _ = leaves(*inputs_of(LayerNormShape(20, 33)))
    with target.active():
        y = path(target)(x, weight)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        loss = y.sum() + dx.square().sum()
        with pytest.raises(
            RuntimeError, match=r"(?i)once_differentiable|double backward|no autograd formula"
        ):
            loss.backward()


def test_signature_is_torchs_an_offset_and_a_backend() -> None:
    mine = list(inspect.signature(lmkern.rms_norm).parameters.values())
    theirs = list(inspect.signature(F.rms_norm).parameters.values())
    assert [(p.name, p.default) for p in mine[:-2]] == [(p.name, p.default) for p in theirs]
    assert [p.name for p in mine[-2:]] == ["offset", "backend"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"normalized_shape": (4,)}, r"rms_norm: input must end in normalized_shape \(4,\); got \(2, 3\)"),
        ({"weight": torch.ones(4)}, r"rms_norm: weight must be \(3,\); got \(4,\)"),
        ({"weight": torch.ones(3).double()}, r"weight must have input's dtype torch.float32, .*float64"),
        ({"weight": torch.ones(3, device="meta")}, r"weight must be on input's device cpu; got meta"),
        ({"input": torch.ones(2, 3, dtype=torch.int64)}, r"input must be one of float32, .*torch.int64"),
        ({"backend": "cdua"}, r"rms_norm: no backend 'cdua'; expected one of .*reference"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(changed: dict[str, object], message: str) -> None:
    arguments = {"input": torch.zeros(2, 3), "normalized_shape": (3,), **changed}
    with pytest.raises(ValueError, match=message):
        lmkern.rms_norm(**arguments)
