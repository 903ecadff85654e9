"""`lmkern.layer_norm` on every backend: values and gradients against the exact ones, edges, errors."""

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
    layer_norm_results,
    leaves,
    mean_verdicts,
    measure,
    poisoned_memory,
    targets,
    verdicts,
)
from lmkern.testing import exact as long_double

TARGETS = targets("layer_norm")
IN_FLOAT32 = [target for target in TARGETS if target.takes(torch.float32)]
# The reference is the formula in torch's own operations: what it must be is right, not better than torch.
KERNELS = [target for target in TARGETS if target.backend != "reference"]
# Of x, and of weight and bias.
DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float64, torch.float64),
)
RESULTS = ("y", "dx", "dweight", "dbias")
EPS = 1e-5
TARGETS_DTYPES = [
    (target, *dtypes) for target in KERNELS for dtypes in target.some(DTYPES, 2) if target.takes(dtypes[0])
]


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


def widest(target: Target) -> torch.dtype:
    return torch.float64 if target.takes(torch.float64) else torch.float32


def shapes(target: Target) -> list[LayerNormShape]:
    return target.some(LAYER_NORM_SHAPES, 3)


CASES = [(*case, shape) for case in TARGETS_DTYPES for shape in shapes(case[0])]


def ours(backend: str | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return lmkern.layer_norm(x, x.shape[-1:], weight, bias, EPS, backend=backend)

    return call


def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


@functools.cache
def errors(
    target: Target, dtype: torch.dtype, parameter_dtype: torch.dtype, shape: LayerNormShape, seed: int = 0
) -> dict[str, Errors]:
    inputs = layer_norm_inputs(shape, dtype, parameter_dtype=parameter_dtype, seed=seed)
    with poisoned_memory(), target.active():
        mine = layer_norm_results(ours(target.backend), *(x.to(target.device) for x in inputs))
    theirs = layer_norm_results(torchs, *inputs)
    x, weight, _, dy = inputs
    exact = long_double.layer_norm(*inputs, EPS)
    at_least = {}
    if shape.E <= 2:
        # x_hat of one element vanishes, of two it is 1 or -1: gradients are differences of such terms.
        rstd = float((x.double().var(1, correction=0) + EPS).rsqrt().max())
        at_least["dx"] = rstd * float((dy.double() * weight.double()).abs().max())
        at_least["dweight"] = rstd * float(x.abs().max()) * float(dy.abs().max())
    return {n: measure(mine[n].cpu(), theirs[n], exact[n], at_least=at_least.get(n, 0.0)) for n in RESULTS}


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
    draws = [functools.partial(errors, target, dtype, parameter_dtype, shape) for shape in shapes(target)]
    assert not (found := mean_verdicts(draws, target.units_beside)), "\n".join(found)


@pytest.mark.parametrize("shape", LAYER_NORM_SHAPES, ids=str)
def test_reference_agrees_with_the_formula_in_long_double(shape: LayerNormShape) -> None:
    inputs = layer_norm_inputs(shape, torch.float64)
    mine = layer_norm_results(ours("reference"), *inputs)
    for result, exact in long_double.layer_norm(*inputs, EPS).items():
        expected = torch.from_numpy(exact.astype("float64"))
        torch.testing.assert_close(mine[result], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_weight_and_bias_may_be_left_out(target: Target, with_weight: bool, with_bias: bool) -> None:
    dtype = widest(target)
    x, weight, bias, dy = layer_norm_inputs(LayerNormShape(7, 33), dtype, device=target.device)
    results = []
    for function, options in ((lmkern.layer_norm, {"backend": target.backend}), (F.layer_norm, {})):
        arguments = leaves(x, *[weight] * with_weight, *[bias] * with_bias)
        named = dict(zip(["weight"] * with_weight + ["bias"] * with_bias, arguments[1:], strict=True))
        with target.active(), poisoned_memory():
            y = function(arguments[0], (33,), **named, eps=0.1, **options)
            results.append((y.detach(), *torch.autograd.grad(y, arguments, dy)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("needs", range(1, 8))
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_gradients_do_not_depend_on_which_are_wanted(target: Target, needs: int) -> None:
    *inputs, dy = layer_norm_inputs(LayerNormShape(40, 33), device=target.device)
    with target.active(), poisoned_memory():
        everything = layer_norm_results(ours(target.backend), *inputs, dy)
        wanted = [bool(needs >> i & 1) for i in range(3)]
        arguments = [x.clone().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
        ours(target.backend)(*arguments).backward(dy)
    for x, want, result in zip(arguments, wanted, RESULTS[1:], strict=True):
        assert (x.grad is not None) == want
        if want:
            assert torch.equal(x.grad, everything[result])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "sliced rows": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "columns": lambda x: x.mT.contiguous().mT,
    "every second element": lambda x: x.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_strides_are_free(target: Target, layout: str) -> None:
    x, weight, bias, dy = layer_norm_inputs(LayerNormShape(20, 33), device=target.device)
    call, lay = ours(target.backend), LAYOUTS[layout]
    with target.active(), poisoned_memory():
        expected = layer_norm_results(call, x, weight, bias, dy)
        mine = layer_norm_results(
            call, lay(x), weight.repeat(2)[:33], bias.repeat_interleave(2)[::2], lay(dy)
        )
    for result, value in mine.items():
        assert torch.equal(value, expected[result]), result


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_gradient_with_stride_zero_and_rows_with_stride_zero(target: Target) -> None:
    dtype = widest(target)
    x, weight, bias, _ = layer_norm_inputs(LayerNormShape(1, 33), dtype, device=target.device)
    x = x.expand(20, 33)
    with target.active():
        mine = layer_norm_results(
            ours(target.backend), x, weight, bias, torch.ones((), dtype=dtype).expand(20, 33)
        )
    theirs = layer_norm_results(torchs, x.contiguous(), weight, bias, torch.ones(20, 33, dtype=dtype))
    for result, value in mine.items():
        torch.testing.assert_close(value, theirs[result], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normalized", [(5,), (4, 5), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_normalized_shape_of_several_dimensions(target: Target, normalized: tuple[int, ...]) -> None:
    dtype = widest(target)
    x = torch.randn(3, 4, 5, dtype=dtype).to(target.device)
    weight, bias = (torch.randn(normalized, dtype=dtype).to(target.device) for _ in range(2))
    with target.active():
        mine = lmkern.layer_norm(x, normalized, weight, bias, backend=target.backend)
    torch.testing.assert_close(mine, F.layer_norm(x, normalized, weight, bias))
    assert lmkern.layer_norm(x.mT, (4,)).shape == (3, 5, 4)


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_no_rows(target: Target, lead: tuple[int, ...]) -> None:
    _, weight, bias, _ = layer_norm_inputs(LayerNormShape(1, 5), device=target.device)
    x = torch.empty(*lead, 5, device=target.device)
    with target.active(), poisoned_memory():
        mine = layer_norm_results(ours(target.backend), x, weight, bias, torch.empty_like(x))
    assert mine["y"].shape == mine["dx"].shape == x.shape
    assert (mine["dweight"] == 0).all()
    assert (mine["dbias"] == 0).all()


def test_rows_without_elements_and_meta_tensors_give_shapes() -> None:
    assert lmkern.layer_norm(torch.zeros(3, 0), (0,)).shape == (3, 0)
    x = torch.zeros(2, 3, 5, device="meta", dtype=torch.bfloat16)
    y = lmkern.layer_norm(x, (5,), x[0, 0], x[0, 0])
    assert (y.shape, y.dtype, y.device.type) == (x.shape, x.dtype, "meta")


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_large_mean_costs_no_more_than_torch_pays(target: Target) -> None:
    def draw(E: int, seed: int) -> dict[str, Errors]:
        inputs = layer_norm_inputs(LayerNormShape(20, E), device=target.device, seed=seed, mean=1e4)
        with target.active():
            mine = layer_norm_results(ours(target.backend), *inputs)
        inputs = tuple(x.cpu() for x in inputs)
        theirs, exact = layer_norm_results(torchs, *inputs), long_double.layer_norm(*inputs, EPS)
        return {n: measure(mine[n].cpu(), theirs[n], exact[n]) for n in RESULTS}

    for E in (33, 768, 4000):
        found = verdicts(functools.partial(draw, E), target.units_beside)
        assert not found, f"{E}: " + "\n".join(found)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0e4, 0.1, 12345.678])
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_constant_row_gives_the_bias(target: Target, value: float) -> None:
    for E in (1, 17, 64, 768):
        _, weight, bias, _ = layer_norm_inputs(LayerNormShape(1, E), device=target.device)
        x = torch.full((3, E), value, device=target.device)
        with target.active():
            y = lmkern.layer_norm(x, (E,), weight, bias, backend=target.backend)
        # Of a mean that is not corrected: its rounding error, over sqrt(eps).
        rounding = abs(value) * 2.0**-20 / EPS**0.5 * float(weight.abs().max()) + 1e-6
        corrected = target.backend in ("cpu", "triton")
        torch.testing.assert_close(y, bias.expand(3, E), rtol=0, atol=0 if corrected else rounding)


@pytest.mark.parametrize("target", [t for t in IN_FLOAT32 if t.backend in ("cpu", "triton")], ids=str)
def test_nearly_constant_rows_have_the_precision_of_their_numbers(target: Target) -> None:
    for E in (96, 5000):
        x = (12345.678 * (1 + 3e-7 * torch.randn(3, E))).to(target.device)
        with target.active():
            y = lmkern.layer_norm(x, (E,), backend=target.backend)
        exact = torch.nn.functional.layer_norm(x.double(), (E,))
        # Half a unit in the last place of a mean over 8192, over the deviation of 3e-7 of it.
        assert (y.double() - exact).abs().max() < 2.0**-11 / (12345.678 * 3e-7)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_bfloat16_sums_over_many_rows_stay_exact(target: Target) -> None:
    rows = 16_384 if not target.interpreted else 2_048
    x, weight, bias, dy = layer_norm_inputs(LayerNormShape(rows, 16), torch.bfloat16, device=target.device)
    # A sum of terms of one sign, which bfloat16 accumulation would lose beyond 256 terms.
    dy = (dy.abs() + 0.5) * x.float().sub(0.5).sign().to(dy.dtype)
    with target.active():
        mine = layer_norm_results(ours(target.backend), x, weight, bias, dy)
    exact = long_double.layer_norm(x.cpu(), weight.cpu(), bias.cpu(), dy.cpu(), EPS)
    expected = torch.from_numpy(exact["dweight"].astype("float64"))
    assert ((mine["dweight"].cpu().double() - expected) / expected).abs().max() < 0.005


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_bfloat16_dweight_over_many_rows_is_within_half_a_percent(target: Target) -> None:
    rows = 16_384 if not target.interpreted else 2_048
    inputs = layer_norm_inputs(LayerNormShape(rows, 48), torch.bfloat16, device=target.device)
    with target.active():
        mine = layer_norm_results(ours(target.backend), *inputs)
    exact = long_double.layer_norm(*(x.cpu() for x in inputs), EPS)
    for result in ("dweight", "dbias"):
        expected = torch.from_numpy(exact[result].astype("float64"))
        assert (mine[result].cpu().double() - expected).norm() < 0.005 * expected.norm(), result


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_nan_or_infinity_stays_in_its_row(target: Target, bad: float) -> None:
    x, weight, bias, dy = layer_norm_inputs(LayerNormShape(40, 33), device=target.device)
    with target.active():
        clean = layer_norm_results(ours(target.backend), x, weight, bias, dy)
        x[21, 5] = bad
        ill = layer_norm_results(ours(target.backend), x, weight, bias, dy)
    for result in ("y", "dx"):
        assert ill[result][21].isnan().any(), result
        ill[result][21] = clean[result][21]
        assert torch.equal(ill[result], clean[result]), result
    assert ill["y"].isfinite().all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("target", [t for t in TARGETS if t.backend == "cpu"], ids=str)
def test_results_are_bit_equal_for_any_number_of_threads(target: Target, threads: int) -> None:
    inputs = layer_norm_inputs(LayerNormShape(1025, 33))
    with target.active():
        expected = layer_norm_results(ours("cpu"), *inputs)
        torch.set_num_threads(threads)
        mine = layer_norm_results(ours("cpu"), *inputs)
    for result, value in mine.items():
        assert torch.equal(value, expected[result]), result


# From 8 MiB on results pass by the caches, where rows are whole cache lines.
@pytest.mark.parametrize("E", [1024, 1032, 1023])
@pytest.mark.parametrize("target", [t for t in TARGETS if t.backend == "cpu"], ids=str)
def test_large_results_have_the_bits_of_small_ones(target: Target, E: int) -> None:
    dtype = next(dtype for dtype in (torch.float32, torch.bfloat16) if target.takes(dtype))
    R = 2**24 // (E * dtype.itemsize) + 3
    x, weight, bias, dy = layer_norm_inputs(LayerNormShape(R, E), dtype)
    with target.active(), poisoned_memory():
        mine = layer_norm_results(ours("cpu"), x, weight, bias, dy)
        for rows in (slice(R - 4), slice(R - 4, R)):
            part = layer_norm_results(ours("cpu"), x[rows], weight, bias, dy[rows])
            for result in ("y", "dx"):
                assert torch.equal(mine[result][rows], part[result]), (result, rows)
    some = slice(R % 50, R, 50)
    exact = layer_norm_results(torchs, *(t.double() for t in (x[some], weight, bias, dy[some])))
    eps = torch.finfo(dtype).eps
    for result in ("y", "dx"):
        torch.testing.assert_close(mine[result][some].double(), exact[result], rtol=eps, atol=8 * eps)


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_rows_do_not_depend_on_each_other(target: Target) -> None:
    x, weight, bias, _ = layer_norm_inputs(LayerNormShape(40, 129), device=target.device)
    with target.active():
        whole = ours(target.backend)(x, weight, bias)
        for row in (0, 17, 39):
            alone = ours(target.backend)(x[row : row + 1], weight, bias)[0]
            if target.backend == "reference":
                torch.testing.assert_close(alone, whole[row])
            else:
                assert torch.equal(alone, whole[row])


@pytest.mark.parametrize("target", [t for t in TARGETS if t.takes(torch.float64)], ids=str)
def test_gradcheck(target: Target) -> None:
    torch.set_num_threads(1)
    arguments = leaves(*layer_norm_inputs(LayerNormShape(3, 5), torch.float64)[:3])
    with target.active():
        assert torch.autograd.gradcheck(ours(target.backend), arguments, fast_mode=target.interpreted)


def test_signature_is_torchs_and_a_backend() -> None:
    mine = list(inspect.signature(lmkern.layer_norm).parameters.values())
    theirs = list(inspect.signature(F.layer_norm).parameters.values())
    assert [(p.name, p.default) for p in mine[:-1]] == [(p.name, p.default) for p in theirs]
    assert mine[-1].name == "backend"


@pytest.mark.parametrize(
    ("x", "normalized", "message"),
    [
        ((2, 3), (4,), r"layer_norm: input must end in normalized_shape \(4,\); got \(2, 3\)"),
        ((2, 3), (), r"input must end in normalized_shape \(\); got \(2, 3\)"),
        ((3,), (2, 3), r"input must end in normalized_shape \(2, 3\); got \(3,\)"),
    ],
)
def test_shapes_that_do_not_match(x: tuple[int, ...], normalized: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lmkern.layer_norm(torch.zeros(x), normalized)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.ones(4)}, r"weight must be \(3,\); got \(4,\)"),
        ({"bias": torch.ones(1, 3)}, r"bias must be \(3,\); got \(1, 3\)"),
        (
            {"weight": torch.ones(3).double()},
            r"weight must have input's dtype torch.float32, .*; got torch.float64",
        ),
        (
            {"bias": torch.ones(3).bfloat16()},
            r"bias must have input's dtype torch.float32, .*; got torch.bfloat16",
        ),
        ({"weight": torch.ones(3, device="meta")}, r"weight must be on input's device cpu; got meta"),
        (
            {"input": torch.ones(2, 3, dtype=torch.int64)},
            r"input must be one of float32, .*; got torch.int64",
        ),
        ({"backend": "cdua"}, r"layer_norm: no backend 'cdua'; expected one of .*reference"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(changed: dict[str, object], message: str) -> None:
    arguments = {"input": torch.zeros(2, 3), "normalized_shape": (3,), **changed}
    with pytest.raises(ValueError, match=message):
        lmkern.layer_norm(**arguments)


@pytest.mark.parametrize("parameters", [torch.float16, torch.float32], ids=ids)
def test_weight_and_bias_in_two_dtypes(parameters: torch.dtype) -> None:
    x = torch.randn(2, 3, dtype=torch.float16)
    weight, bias = torch.randn(3, dtype=parameters), torch.randn(3)
    expected = F.layer_norm(x.double(), (3,), weight.double(), bias.double()).half()
    torch.testing.assert_close(lmkern.layer_norm(x, (3,), weight, bias), expected, rtol=1e-3, atol=1e-3)
    assert lmkern.layer_norm(x, (3,), None, bias).dtype == torch.float16
