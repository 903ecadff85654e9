"""`lmkern.layer_norm` as a citizen of torch: registration, compilation, double backward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lmkern
from lmkern.testing import LayerNormShape, Target, layer_norm_inputs, layer_norm_results, leaves, targets

TARGETS = targets("layer_norm")
IN_FLOAT32 = [target for target in TARGETS if target.takes(torch.float32)]
SHAPE = LayerNormShape(20, 33)
EPS = 1e-5

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def direct(target: Target) -> Call:
    return lambda x, weight, bias: lmkern.layer_norm(
        x, x.shape[-1:], weight, bias, EPS, backend=target.backend
    )


def registered(target: Target) -> Call:
    return lambda x, weight, bias: torch.ops.lmkern.layer_norm(x, weight, bias, EPS, target.backend)[0]


def compiled(target: Target) -> Call:
    return torch.compile(direct(target), fullgraph=True, backend="aot_eager")


PATHS = {"direct": direct, "registered": registered, "compiled": compiled}


@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_direct_path_is_bit_equal_to_the_registered_op(target: Target, parameter_dtype: torch.dtype) -> None:
    inputs = layer_norm_inputs(SHAPE, torch.bfloat16, parameter_dtype=parameter_dtype, device=target.device)
    with target.active():
        expected = layer_norm_results(direct(target), *inputs)
        op = layer_norm_results(registered(target), *inputs)
    for result, value in expected.items():
        assert torch.equal(value, op[result]), result
        assert value.dtype == op[result].dtype


@pytest.mark.parametrize("with_parameters", [False, True])
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_opcheck(target: Target, with_parameters: bool) -> None:
    x, weight, bias, dy = layer_norm_inputs(SHAPE, device=target.device)
    parameters = leaves(weight, bias) if with_parameters else (None, None)
    with target.active():
        torch.library.opcheck(
            torch.ops.lmkern.layer_norm.default, (*leaves(x), *parameters, EPS, target.backend)
        )
        _, mean, rstd = torch.ops.lmkern.layer_norm(x, weight, bias, EPS, target.backend)
        for needs in ([True, with_parameters, with_parameters], [False, False, with_parameters]):
            constants = [None if p is None else p.detach() for p in parameters]
            arguments = (dy, x, *constants, mean, rstd, target.backend, needs)
            torch.library.opcheck(torch.ops.lmkern.layer_norm_backward.default, arguments)


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_compiled_is_bit_equal_to_eager_and_compiled_once_more_for_other_batches(target: Target) -> None:
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = torch.compile(direct(target), fullgraph=True, backend=counter)
    with target.active():
        for rows in (20, 30, 50, 70):
            inputs = layer_norm_inputs(LayerNormShape(rows, 33), device=target.device)
            eager = layer_norm_results(direct(target), *inputs)
            for result, value in layer_norm_results(call, *inputs).items():
                assert torch.equal(value, eager[result]), result
    assert counter.frame_count <= 2


# torch's own, while inductor is imported.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled_by_inductor_is_bit_equal_to_eager() -> None:
    torch.compiler.reset()
    target = TARGETS[-1]
    inputs = layer_norm_inputs(SHAPE, device=target.device)
    eager = layer_norm_results(direct(target), *inputs)
    call = torch.compile(direct(target), fullgraph=True)
    for result, value in layer_norm_results(call, *inputs).items():
        assert torch.equal(value, eager[result]), result


@pytest.mark.parametrize("path", ["registered", "compiled"])
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_double_backward_outside_eager_mode_is_refused(target: Target, path: str) -> None:
    torch.compiler.reset()
    x, weight, bias, _ = leaves(*layer_norm_inputs(SHAPE, device=target.device))
    with target.active():
        y = PATHS[path](target)(x, weight, bias)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        # The first term has a gradient of its own: a second one left out would go unnoticed.
        loss = y.sum() + dx.square().sum()
        with pytest.raises(
            RuntimeError, match=r"(?i)once_differentiable|double backward|no autograd formula"
        ):
            loss.backward()


DOUBLE = [target for target in TARGETS if target.takes(torch.float64)]


@pytest.mark.parametrize("parameters", [(), ("weight",), ("bias",), ("weight", "bias")], ids=str)
@pytest.mark.parametrize("target", DOUBLE, ids=str)
def test_gradgradcheck(target: Target, parameters: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    x, weight, bias, dy = leaves(*layer_norm_inputs(LayerNormShape(3, 4), torch.float64))
    given = [{"weight": weight, "bias": bias}[name] for name in parameters]

    def call(x: Tensor, *given: Tensor) -> Tensor:
        named = dict(zip(parameters, given, strict=True))
        return lmkern.layer_norm(x, (4,), **named, eps=EPS, backend=target.backend)

    with target.active():
        assert torch.autograd.gradgradcheck(call, (x, *given), (dy,))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_gradient_penalty_is_the_exact_one(target: Target, dtype: torch.dtype, bound: float) -> None:
    # dy depends on x, and its share must not be counted twice.
    def penalty_gradients(layer_norm: Call, *inputs: Tensor) -> tuple[Tensor, ...]:
        x, weight, bias = leaves(*inputs)
        (dx,) = torch.autograd.grad((layer_norm(x, weight, bias) * x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, weight, bias))

    inputs = layer_norm_inputs(SHAPE, dtype, device=target.device)[:3]
    with target.active():
        mine = penalty_gradients(direct(target), *inputs)
    exact = penalty_gradients(
        lambda x, weight, bias: torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, EPS),
        *(t.cpu().double() for t in inputs),
    )
    for one, expected in zip(mine, exact, strict=True):
        assert (one.cpu().double() - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_third_derivatives_are_refused(target: Target) -> None:
    x, weight, bias, _ = leaves(*layer_norm_inputs(SHAPE, device=target.device))
    with target.active():
        y = direct(target)(x, weight, bias)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (ddx,) = torch.autograd.grad(dx.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            ddx.sum().backward()
