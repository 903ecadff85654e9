"""`lmkern.add_norm` on every backend: values and gradients against the exact ones, dropout, edges, errors."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lmkern
from lmkern.kernels import philox
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
    seeded_randn,
    targets,
    verdicts,
)
from lmkern.testing import exact as long_double

TARGETS = targets("add_norm")
IN_FLOAT32 = [target for target in TARGETS if target.takes(torch.float32)]
# The reference is the formula in torch's own operations: what it must be is right, not better than torch.
KERNELS = [target for target in TARGETS if target.backend != "reference"]
# Of x, of the residual, and of weight and bias.
DTYPES = (
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.float16, torch.float32),
    (torch.float64, torch.float64, torch.float64),
)
NORMS = ("layer", "rms")
RESULTS = ("y", "h", "dx", "dresidual", "dweight", "dbias")
EPS = 1e-5
SEED = -0x123456789ABCDEF
# Wide rows are the business of the norms' own tests.
SHAPES = [shape for shape in LAYER_NORM_SHAPES if 2 < shape.E <= 4096]
CASES = [
    (target, dtypes, norm)
    for target in KERNELS
    for dtypes in target.some(DTYPES, 2)
    if target.takes(dtypes[0])
    for norm in NORMS
]

Inputs = tuple[Tensor, ...]
Call = Callable[..., tuple[Tensor, Tensor]]


def ids(value: object) -> str:
    if isinstance(value, tuple):
        return "-".join(map(ids, value))
    return str(value).removeprefix("torch.")


def inputs_of(
    shape: LayerNormShape,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 3,
    norm: str = "layer",
    seed: int = 0,
) -> tuple[Inputs, Inputs]:
    """(x, residual, weight, bias; no bias for RMS norm), (dy, dh)"""
    dtype, residual_dtype, parameter_dtype = dtypes
    x, weight, bias, dy = layer_norm_inputs(shape, dtype, parameter_dtype=parameter_dtype, seed=seed)
    randn = seeded_randn(seed + 1, residual_dtype)
    residual, dh = randn(shape.R, shape.E), randn(shape.R, shape.E)
    parameters = (weight, bias) if norm == "layer" else (weight,)
    return (x, residual, *parameters), (dy, dh)


def ours(backend: str | None, norm: str = "layer", **options: Any) -> Call:
    return functools.partial(lmkern.add_norm, eps=EPS, norm=norm, backend=backend, **options)


def torchs(norm: str) -> Call:
    def call(x: Tensor, residual: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        h = residual + x
        function = F.layer_norm if norm == "layer" else F.rms_norm
        in_one_dtype = (parameter.to(h.dtype) for parameter in parameters)
        return function(h, h.shape[-1:], *in_one_dtype, eps=EPS).to(x.dtype), h

    return call


def results(call: Call, inputs: Inputs, directions: Inputs) -> dict[str, Tensor]:
    arguments = leaves(*inputs)
    outputs = call(*arguments)
    gradients = torch.autograd.grad(outputs, arguments, directions)
    return dict(zip(RESULTS, (*(output.detach() for output in outputs), *gradients), strict=False))


def exact(inputs: Inputs, directions: Inputs, norm: str) -> dict[str, Any]:
    """In float64, from the exact sum of x and residual."""
    x, residual, weight, *bias = (t.double() for t in inputs)
    dy, dh = directions
    h = x + residual
    if norm == "layer":
        found = long_double.layer_norm(h, weight, *bias, dy, EPS)
    else:
        found = long_double.rms_norm(h, weight, dy, EPS)
    dx = found.pop("dx") + long_double.long_double(dh)
    return found | {"h": h.cpu().numpy().astype(np.longdouble), "dx": dx, "dresidual": dx}


@functools.cache
def errors(
    target: Target, dtypes: tuple[torch.dtype, ...], norm: str, shape: LayerNormShape, seed: int = 0
) -> dict[str, Errors]:
    inputs, directions = inputs_of(shape, dtypes, norm, seed)
    with poisoned_memory(), target.active():
        mine = results(ours(target.backend, norm), inputs, directions)
    theirs, expected = results(torchs(norm), inputs, directions), exact(inputs, directions, norm)
    return {name: measure(mine[name], theirs[name], expected[name]) for name in mine}


@pytest.mark.parametrize(
    ("target", "dtypes", "norm", "shape"),
    [(*case, shape) for case in CASES for shape in case[0].some(SHAPES, 3)],
    ids=ids,
)
def test_errors_are_at_most_twice_torchs(
    target: Target, dtypes: tuple[torch.dtype, ...], norm: str, shape: LayerNormShape
) -> None:
    found = verdicts(functools.partial(errors, target, dtypes, norm, shape), target.units_beside)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("target", "dtypes", "norm"), CASES, ids=ids)
def test_errors_over_all_shapes_are_at_most_torchs(
    target: Target, dtypes: tuple[torch.dtype, ...], norm: str
) -> None:
    shapes = target.some(SHAPES, 3)
    draws = [functools.partial(errors, target, dtypes, norm, shape) for shape in shapes]
    found = mean_verdicts(draws, target.units_beside)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("target", [t for t in KERNELS if t.takes(torch.float32)], ids=str)
def test_dropout_is_the_references(target: Target, dropout_p: float, norm: str) -> None:
    for shape in (LayerNormShape(20, 33), LayerNormShape(3, 1000)):
        inputs, directions = inputs_of(shape, (torch.float64,) * 3, norm)
        options: dict[str, Any] = {"dropout_p": dropout_p, "dropout_seed": torch.tensor(SEED), "offset": 1.0}
        expected = results(ours("reference", norm, **options), inputs, directions)
        with target.active(), poisoned_memory():
            mine = results(ours(target.backend, norm, **options), inputs, directions)
        for name, value in mine.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_dropout_keeps_what_philox_keeps_and_scales_it(target: Target) -> None:
    x, zeros = torch.ones(40, 300), torch.zeros(40, 300)
    (x_leaf,) = leaves(x)
    with target.active():
        _, h = ours(target.backend, dropout_p=0.3, dropout_seed=torch.tensor(SEED))(x_leaf, zeros)
        (dx,) = torch.autograd.grad(h, x_leaf, x)
    kept = philox.keep_mask(torch.tensor(SEED), 0.3, x.shape)
    assert torch.equal(h != 0, kept)
    assert torch.equal(h, kept * torch.tensor(philox.keep_scale(0.3), dtype=torch.float32))
    assert torch.equal(dx, h)
    assert abs(float(kept.double().mean()) - 0.7) < 0.02


def test_a_seed_of_its_own_comes_from_torchs_generator() -> None:
    x = torch.randn(4, 64)
    torch.manual_seed(1)
    first, second = (lmkern.add_norm(x, x, dropout_p=0.5)[1] for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(lmkern.add_norm(x, x, dropout_p=0.5)[1], first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_y_is_the_norm_of_h_as_stored(target: Target, norm: str) -> None:
    dtypes = (torch.bfloat16,) * 3
    (x, residual, *parameters), _ = inputs_of(LayerNormShape(9, 100), dtypes, norm)
    with target.active():
        y, h = ours(target.backend, norm)(x, residual, *parameters)
        function: Any = lmkern.layer_norm if norm == "layer" else lmkern.rms_norm
        assert torch.equal(y, function(h, (100,), *parameters, eps=EPS, backend=target.backend))
    assert torch.equal(h, residual + x)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("residual_dtype", [torch.bfloat16, torch.float32], ids=ids)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_gradients_do_not_depend_on_which_are_wanted(
    target: Target, residual_dtype: torch.dtype, dropout_p: float
) -> None:
    inputs, directions = inputs_of(LayerNormShape(40, 33), (torch.bfloat16, residual_dtype, torch.float32))
    call = ours(target.backend, dropout_p=dropout_p, dropout_seed=torch.tensor(SEED))
    with target.active(), poisoned_memory():
        everything = results(call, inputs, directions)
        for needs in range(1, 16):
            wanted = [bool(needs >> i & 1) for i in range(4)]
            arguments = [x.clone().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
            outputs, given = call(*arguments), directions
            # With parameters alone h has no gradient to give.
            if not any(wanted[:2]):
                outputs, given = outputs[:1], directions[:1]
            torch.autograd.backward(outputs, given)
            for x, want, name in zip(arguments, wanted, RESULTS[2:], strict=True):
                assert (x.grad is not None) == want
                if want:
                    assert torch.equal(x.grad, everything[name]), (name, wanted)


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_one_of_the_two_results_may_be_all_that_is_used(target: Target) -> None:
    inputs, (dy, dh) = inputs_of(LayerNormShape(20, 33), (torch.float64,) * 3)
    zero = torch.zeros_like(dy)
    call = ours(target.backend, dropout_p=0.25, dropout_seed=torch.tensor(SEED))
    for used, directions in ((0, (dy, zero)), (1, (zero, dh))):
        arguments = leaves(*inputs)
        with target.active(), poisoned_memory():
            expected = results(call, inputs, directions)
            gradients = torch.autograd.grad(call(*arguments)[used], arguments, directions[used])
        for name, gradient in zip(RESULTS[2:], gradients, strict=True):
            torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_shapes_and_strides_are_free(target: Target) -> None:
    inputs, directions = inputs_of(LayerNormShape(20, 33))
    x, residual, weight, bias = inputs
    call = ours(target.backend)
    with target.active(), poisoned_memory():
        expected = results(call, inputs, directions)
        for lay in (
            lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
            lambda t: t.mT.contiguous().mT,
            lambda t: t.repeat_interleave(2, 1)[:, ::2],
            lambda t: t.view(4, 5, 33),
        ):
            laid = (lay(x), lay(residual), weight.repeat_interleave(2)[::2], bias)
            mine = results(call, laid, tuple(map(lay, directions)))
            for name, value in mine.items():
                assert torch.equal(value.view(expected[name].shape), expected[name]), name
                assert value.is_contiguous()
        ones = torch.ones(()).expand(20, 33)
        assert torch.equal(
            results(call, inputs, (ones, ones))["dx"],
            results(call, inputs, (ones.contiguous(), ones.contiguous()))["dx"],
        )


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_no_rows_one_dimension_and_meta_tensors(target: Target) -> None:
    call = ours(target.backend)
    with target.active(), poisoned_memory():
        empty, weight = torch.empty(2, 0, 5), torch.ones(5)
        mine = results(call, (empty, empty, weight, weight), (empty, empty))
        assert mine["y"].shape == mine["h"].shape == mine["dx"].shape == empty.shape
        assert (mine["dweight"] == 0).all()
        x = torch.randn(5)
        y, h = call(x, x)
        torch.testing.assert_close(y, F.layer_norm(2 * x, (5,)))
        assert h.shape == (5,)
    meta = torch.zeros(2, 3, 5, device="meta", dtype=torch.bfloat16)
    y, h = lmkern.add_norm(meta, meta.float())
    assert (y.shape, y.dtype, h.dtype) == (meta.shape, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_nan_stays_in_its_row(target: Target) -> None:
    inputs, directions = inputs_of(LayerNormShape(40, 33))
    call = ours(target.backend, dropout_p=0.25, dropout_seed=torch.tensor(SEED))
    with target.active():
        clean = results(call, inputs, directions)
        inputs[1][21, 5] = torch.nan
        ill = results(call, inputs, directions)
    for name in ("y", "h", "dx", "dresidual"):
        assert ill[name][21].isnan().any(), name
        ill[name][21] = clean[name][21]
        assert torch.equal(ill[name], clean[name]), name


# From 8 MiB on results pass by the caches, where rows are whole cache lines.
@pytest.mark.parametrize(("residual_dtype", "dropout_p"), [(torch.float32, 0.25), (torch.bfloat16, 0.0)])
@pytest.mark.parametrize("target", [t for t in TARGETS if t.backend == "cpu"], ids=ids)
def test_large_results_have_the_bits_of_small_ones(
    target: Target, residual_dtype: torch.dtype, dropout_p: float
) -> None:
    R, small = 8195, slice(4095)
    inputs, directions = inputs_of(LayerNormShape(R, 1024), (torch.bfloat16, residual_dtype, torch.float32))
    (x, residual, *parameters), (dy, dh) = inputs, directions
    call = ours("cpu", dropout_p=dropout_p, dropout_seed=torch.tensor(SEED))
    with target.active(), poisoned_memory():
        mine = results(call, inputs, directions)
        part = results(call, (x[small], residual[small], *parameters), (dy[small], dh[small]))
    for name in ("y", "h", "dx", "dresidual"):
        assert torch.equal(mine[name][small], part[name]), name
    last = slice(R - 100, R)
    wide = [t.double() for t in (x[last], residual[last], *parameters, dy[last], dh[last])]
    if dropout_p:
        kept = philox.keep_mask(torch.tensor(SEED), dropout_p, x.shape)[last] * philox.keep_scale(dropout_p)
        wide[0] = wide[0] * kept
    exact = results(torchs("layer"), tuple(wide[:4]), tuple(wide[4:]))
    if dropout_p:
        exact["dx"] = exact["dx"] * kept
    for name in ("y", "h", "dx", "dresidual"):
        eps = torch.finfo(mine[name].dtype).eps
        # y is the norm of h as it is stored.
        torch.testing.assert_close(mine[name][last].double(), exact[name], rtol=eps, atol=8 * eps)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("target", [t for t in TARGETS if t.backend == "cpu"], ids=str)
def test_results_are_bit_equal_for_any_number_of_threads(target: Target, threads: int) -> None:
    inputs, directions = inputs_of(LayerNormShape(1025, 33))
    call = ours("cpu", dropout_p=0.25, dropout_seed=torch.tensor(SEED))
    with target.active():
        expected = results(call, inputs, directions)
        torch.set_num_threads(threads)
        mine = results(call, inputs, directions)
    for name, value in mine.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_gradcheck(target: Target, norm: str) -> None:
    torch.set_num_threads(1)
    inputs, _ = inputs_of(LayerNormShape(3, 5), (torch.float64,) * 3, norm)
    call = ours(target.backend, norm, dropout_p=0.25, dropout_seed=torch.tensor(SEED), offset=1.0)
    with target.active():
        assert torch.autograd.gradcheck(call, leaves(*inputs), fast_mode=target.interpreted)


def options_of(target: Target, norm: str) -> tuple[Any, ...]:
    return (norm == "layer", EPS, 1.0, 0.25, torch.tensor(SEED), target.backend)


def direct(target: Target, norm: str) -> Call:
    return ours(target.backend, norm, dropout_p=0.25, dropout_seed=torch.tensor(SEED), offset=1.0)


def registered(target: Target, norm: str) -> Call:
    def call(
        x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y, h, _, _ = torch.ops.lmkern.add_norm(x, residual, weight, bias, *options_of(target, norm))
        return y, h

    return call


def compiled(target: Target, norm: str) -> Call:
    return torch.compile(direct(target, norm), fullgraph=True, backend="aot_eager")


Path = Callable[[Target, str], Call]


@pytest.mark.parametrize("path", [registered, compiled])
@pytest.mark.parametrize("residual_dtype", [torch.bfloat16, torch.float32], ids=ids)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_direct_path_is_bit_equal_to_the_others(
    target: Target, norm: str, residual_dtype: torch.dtype, path: Path
) -> None:
    torch.compiler.reset()
    dtypes = (torch.bfloat16, residual_dtype, torch.float32)
    inputs, directions = inputs_of(LayerNormShape(20, 33), dtypes, norm)
    with target.active():
        expected = results(direct(target, norm), inputs, directions)
        mine = results(path(target, norm), inputs, directions)
    for name, value in expected.items():
        assert torch.equal(value, mine[name]), name
        assert value.dtype == mine[name].dtype


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_opcheck(target: Target, norm: str) -> None:
    (x, residual, weight, *bias), (dy, dh) = inputs_of(LayerNormShape(20, 33), norm=norm)
    options, rest = options_of(target, norm), (weight, *(bias or [None]))
    wanted = [None if t is None else t.detach().requires_grad_() for t in (x, residual, *rest)]
    with target.active():
        torch.library.opcheck(torch.ops.lmkern.add_norm.default, (*wanted, *options))
        _, h, mean, rstd = torch.ops.lmkern.add_norm(x, residual, *rest, *options)
        for needs in ([True] * 3 + [norm == "layer"], [False, True, False, False]):
            backward = (dy, dh, h, *rest, mean, rstd, *options, needs)
            torch.library.opcheck(torch.ops.lmkern.add_norm_backward.default, backward)


@pytest.mark.parametrize("path", [direct, registered, compiled])
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_double_backward_is_refused(target: Target, path: Path) -> None:
    torch.compiler.reset()
    inputs, _ = inputs_of(LayerNormShape(20, 33))
    arguments = leaves(*inputs)
    with target.active():
        y, h = path(target, "layer")(*arguments)
        (dx,) = torch.autograd.grad(y.square().sum() + h.sum(), arguments[0], create_graph=True)
        loss = y.sum() + dx.square().sum()
        with pytest.raises(
            RuntimeError, match=r"(?i)once_differentiable|double backward|no autograd formula"
        ):
            loss.backward()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(())}, r"add_norm: x must have a last dimension"),
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, r"x must be one of float32, .*torch.int64"),
        ({"residual": torch.zeros(3)}, r"add_norm: residual must be \(2, 3\); got \(3,\)"),
        ({"residual": torch.zeros(2, 3).double()}, r"residual must have x's dtype torch.float32, .*float64"),
        ({"weight": torch.ones(4)}, r"add_norm: weight must be \(3,\); got \(4,\)"),
        ({"bias": torch.ones(3).bfloat16()}, r"bias must have x's dtype torch.float32, .*bfloat16"),
        ({"weight": torch.ones(3, device="meta")}, r"weight must be on x's device cpu; got meta"),
        ({"norm": "batch"}, r"norm must be 'layer' or 'rms'; got 'batch'"),
        ({"norm": "rms", "bias": torch.ones(3)}, r"RMS norm has no bias; got one. Leave it out"),
        ({"dropout_p": 1.5}, r"dropout_p must lie in \[0, 1\]; got 1.5"),
        ({"dropout_seed": torch.tensor(1.0)}, r"dropout_seed must be an int64 tensor .*; got torch.float32"),
        ({"backend": "cdua"}, r"add_norm: no backend 'cdua'; expected one of .*reference"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 3), "residual": torch.zeros(2, 3), **changed}
    with pytest.raises(ValueError, match=message):
        lmkern.add_norm(**arguments)
