"""`lmkern.activation` on every backend: values and gradients against float64, edges, errors."""

import functools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lmkern
from lmkern.kernels.activation import FUNCTIONS
from lmkern.testing import (
    Errors,
    Target,
    leaves,
    mean_verdicts,
    measure,
    poisoned_memory,
    seeded_randn,
    targets,
    verdicts,
)
from lmkern.testing import exact as long_double

TARGETS = targets("activation")
IN_FLOAT32 = [target for target in TARGETS if target.takes(torch.float32)]
KERNELS = [target for target in TARGETS if target.backend != "reference"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RESULTS = ("y", "dx", "dbias")
# (R, F): beside every vector width, and beside 16 and 64 chunks of 16 rows.
SHAPES = ((1, 1), (5, 3), (7, 15), (17, 17), (33, 65), (100, 127), (1025, 33), (37, 768))
FORMS = [(function, gated) for function in FUNCTIONS for gated in (False, True)]

TORCHS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
}


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


def inputs(
    rows: int,
    columns: int,
    gated: bool,
    dtype: torch.dtype = torch.float32,
    *,
    spread: float = 2.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    randn = seeded_randn(seed, dtype)
    width = 2 * columns if gated else columns
    return randn(rows, width) * spread, randn(width), randn(rows, columns)


def results(
    call: Callable[[Tensor, Tensor], Tensor], x: Tensor, bias: Tensor, dy: Tensor
) -> dict[str, Tensor]:
    x, bias = leaves(x, bias)
    y = call(x, bias)
    return dict(zip(RESULTS, (y.detach(), *torch.autograd.grad(y, (x, bias), dy)), strict=True))


def ours(function: str, gated: bool, backend: str | None) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, bias: lmkern.activation(x, bias, function, gated=gated, backend=backend)


def torchs(function: str, gated: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def call(x: Tensor, bias: Tensor) -> Tensor:
        if not gated:
            return TORCHS[function](x + bias)
        gate, value = (x + bias).chunk(2, dim=-1)
        return TORCHS[function](gate) * value

    return call


@functools.cache
def errors(
    target: Target, function: str, gated: bool, dtype: torch.dtype, shape: tuple[int, int], seed: int = 0
) -> dict[str, Errors]:
    arguments = inputs(*shape, gated, dtype, seed=seed)
    with poisoned_memory(), target.active():
        mine = results(ours(function, gated, target.backend), *arguments)
    theirs = results(torchs(function, gated), *arguments)
    exact = long_double.activation(*arguments, function, gated=gated)
    return {name: measure(mine[name], theirs[name], exact[name]) for name in RESULTS}


@pytest.mark.parametrize(("function", "gated"), FORMS)
@pytest.mark.parametrize(
    ("target", "dtype"),
    [(target, dtype) for target in KERNELS for dtype in target.some(DTYPES, 2) if target.takes(dtype)],
    ids=ids,
)
def test_errors_are_within_torchs(target: Target, function: str, gated: bool, dtype: torch.dtype) -> None:
    draws = {
        shape: functools.partial(errors, target, function, gated, dtype, shape)
        for shape in target.some(SHAPES, 3)
    }
    found = {shape: verdicts(draw, target.units_beside) for shape, draw in draws.items()}
    assert not any(found.values()), found
    assert not (means := mean_verdicts(list(draws.values()), target.units_beside)), means


@pytest.mark.parametrize(("function", "gated"), FORMS)
def test_reference_is_torchs_formula(function: str, gated: bool) -> None:
    arguments = inputs(9, 33, gated, torch.float64)
    mine = results(ours(function, gated, "reference"), *arguments)
    theirs = results(torchs(function, gated), *arguments)
    for name in RESULTS:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=ids)
@pytest.mark.parametrize("target", KERNELS, ids=str)
def test_gelu_keeps_its_digits_in_the_negative_tail(target: Target, dtype: torch.dtype) -> None:
    x = torch.linspace(-12, 0, 4001, dtype=dtype)
    with target.active():
        y = lmkern.gelu(x, backend=target.backend)
    exact = 0.5 * x.double() * torch.erfc(-x.double() * math.sqrt(0.5))
    # e^(-x^2 / 2) turns the rounding of x^2 / 2 into a relative error of up to 72 times the unit.
    torch.testing.assert_close(y.double(), exact, rtol=100 * torch.finfo(dtype).eps, atol=1e-37)


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16], ids=ids)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_bias_is_added_before_rounding_and_its_sum_is_float32(
    target: Target, gated: bool, bias_dtype: torch.dtype
) -> None:
    x, bias, dy = inputs(16_384, 3, gated, torch.bfloat16)
    # Terms of one sign: a bfloat16 sum would stop growing beyond 256 of them.
    arguments = x, bias.to(bias_dtype), dy.abs() + 0.5
    with target.active():
        mine = results(ours("relu", gated, target.backend), *arguments)
    assert mine["dbias"].dtype == bias_dtype
    exact = results(torchs("relu", gated), *(t.double() for t in arguments))
    unit = 2.0**-8 if bias_dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        mine["dbias"].double(), exact["dbias"], rtol=unit, atol=float(exact["dbias"].abs().max()) * unit
    )
    torch.testing.assert_close(mine["y"].double(), exact["y"], rtol=2.0**-8, atol=1e-30)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_bias_may_be_left_out(target: Target, gated: bool) -> None:
    x, bias, dy = inputs(7, 33, gated)
    (x,) = leaves(x)
    with target.active(), poisoned_memory():
        y = lmkern.activation(x, None, "silu", gated=gated, backend=target.backend)
        (dx,) = torch.autograd.grad(y, x, dy)
    theirs = results(torchs("silu", gated), x, torch.zeros_like(bias), dy)
    torch.testing.assert_close((y, dx), (theirs["y"], theirs["dx"]))


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_gradients_do_not_depend_on_which_are_wanted(target: Target, needs: tuple[bool, bool]) -> None:
    x, bias, dy = inputs(40, 33, True)
    call = ours("gelu", True, target.backend)
    with target.active(), poisoned_memory():
        everything = results(call, x, bias, dy)
        arguments = [t.clone().requires_grad_(need) for t, need in zip((x, bias), needs, strict=True)]
        call(*arguments).backward(dy)
    for t, need, name in zip(arguments, needs, RESULTS[1:], strict=True):
        assert (t.grad is not None) == need
        if need:
            assert torch.equal(t.grad, everything[name])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sliced rows": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "columns": lambda x: x.mT.contiguous().mT,
    "every second element": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_strides_are_free(target: Target, layout: str) -> None:
    x, bias, dy = inputs(20, 33, True)
    call, lay = ours("gelu", True, target.backend), LAYOUTS[layout]
    with target.active(), poisoned_memory():
        expected = results(call, x, bias, dy)
        mine = results(call, lay(x), bias.repeat_interleave(2)[::2], lay(dy))
    for name, value in mine.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_gradient_and_rows_with_stride_zero(target: Target) -> None:
    x, bias, _ = inputs(1, 33, True)
    x, dy = x.expand(20, 66), torch.ones(()).expand(20, 33)
    with target.active():
        mine = results(ours("silu", True, target.backend), x, bias, dy)
    theirs = results(torchs("silu", True), x.contiguous(), bias, dy)
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 6), (3, 0), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_no_elements(target: Target, shape: tuple[int, ...]) -> None:
    x, bias = torch.empty(shape), torch.ones(shape[-1])
    with target.active(), poisoned_memory():
        mine = results(ours("gelu", False, target.backend), x, bias, torch.empty(shape))
        gated = lmkern.swiglu(x, bias, backend=target.backend)
    assert mine["y"].shape == mine["dx"].shape == shape
    assert gated.shape == (*shape[:-1], shape[-1] // 2)
    assert (mine["dbias"] == 0).all()


@pytest.mark.parametrize(("function", "gated"), FORMS)
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_infinities_and_nan_stay_where_they_are_and_are_no_worse_than_torchs(
    target: Target, function: str, gated: bool
) -> None:
    x, bias, dy = inputs(6, 33, gated)
    for row, value in enumerate((torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 0.0)):
        x[row, 17] = value
    x[5, :2] = torch.tensor([1e15, -1e15])
    bias[17] = 0
    with target.active():
        mine = results(ours(function, gated, target.backend), x, bias, dy)
    theirs = results(torchs(function, gated), x, bias, dy)
    for name in ("y", "dx"):
        other = torch.arange(mine[name].shape[1]) % 33 != 17
        assert mine[name][:, other].isfinite().all(), name
        for row in (0, 2, 5):
            nan, ill = mine[name][row].isnan(), theirs[name][row].isnan()
            assert not (nan & ~ill).any(), (name, row)
    torch.testing.assert_close(mine["dx"][5, :2], theirs["dx"][5, :2])
    assert mine["y"][2, 17].isnan()
    assert mine["y"][4, 17].abs() == 0


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("target", [t for t in TARGETS if t.backend == "cpu"], ids=str)
def test_results_are_bit_equal_for_any_number_of_threads(target: Target, threads: int) -> None:
    arguments = inputs(1025, 33, True)
    call = ours("gelu", True, "cpu")
    with target.active():
        expected = results(call, *arguments)
        torch.set_num_threads(threads)
        mine = results(call, *arguments)
    for name, value in mine.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(("function", "gated"), FORMS)
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_gradcheck(target: Target, function: str, gated: bool) -> None:
    torch.set_num_threads(1)
    x, bias, _ = inputs(3, 5, gated, torch.float64)
    with target.active():
        assert torch.autograd.gradcheck(
            ours(function, gated, target.backend), leaves(x, bias), fast_mode=target.interpreted
        )


def test_named_forms_are_activation() -> None:
    x, bias, _ = inputs(4, 6, True)
    assert torch.equal(lmkern.swiglu(x, bias), lmkern.activation(x, bias, "silu", gated=True))
    assert torch.equal(lmkern.geglu(x, bias), lmkern.activation(x, bias, "gelu", gated=True))
    assert torch.equal(lmkern.geglu(x, bias, "tanh"), lmkern.activation(x, bias, "gelu_tanh", gated=True))
    assert torch.equal(lmkern.gelu(x, bias), lmkern.activation(x, bias))
    assert torch.equal(lmkern.gelu(x, bias, "tanh"), lmkern.activation(x, bias, "gelu_tanh"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(2, 3), "gated": True}, r"x must have an even last dimension, .*; got \(2, 3\)"),
        ({"x": torch.zeros(())}, r"x must have at least one dimension; got \(\)"),
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, r"x must be one of float32, .*; got torch.int64"),
        ({"bias": torch.ones(3)}, r"bias must be \(4,\); got \(3,\)"),
        ({"bias": torch.ones(4).double()}, r"bias must have x's dtype torch.float32, .*; got torch.float64"),
        ({"bias": torch.ones(4, device="meta")}, r"bias must be on x's device cpu; got meta"),
        ({"function": "tanh"}, r"activation: function must be one of gelu, .*; got 'tanh'"),
        ({"backend": "cdua"}, r"activation: no backend 'cdua'; expected one of .*reference"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lmkern.activation(**{"x": torch.zeros(2, 4), **changed})
    with pytest.raises(ValueError, match="gelu: approximate must be 'none' or 'tanh'; got 'erf'"):
        lmkern.gelu(torch.zeros(2), approximate="erf")
