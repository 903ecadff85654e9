"""`lmkern.activation` as a citizen of torch: registration, compilation, double backward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lmkern
from lmkern.testing import Target, leaves, seeded_randn, targets

TARGETS = targets("activation")
IN_FLOAT32 = [target for target in TARGETS if target.takes(torch.float32)]

Call = Callable[[Tensor, Tensor], Tensor]


def inputs(rows: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    randn = seeded_randn(0, torch.bfloat16)
    return randn(rows, 66), randn(66).float(), randn(rows, 33)


def gradients(call: Call, x: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    x, bias = leaves(x, bias)
    y = call(x, bias)
    return (y.detach(), *torch.autograd.grad(y, (x, bias), dy))


def direct(target: Target) -> Call:
    return lambda x, bias: lmkern.geglu(x, bias, backend=target.backend)


def registered(target: Target) -> Call:
    return lambda x, bias: torch.ops.lmkern.activation(x, bias, "gelu", True, target.backend)


def compiled(target: Target) -> Call:
    return torch.compile(direct(target), fullgraph=True, backend="aot_eager")


PATHS = {"direct": direct, "registered": registered, "compiled": compiled}


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_direct_path_is_bit_equal_to_the_registered_op(target: Target) -> None:
    with target.active():
        expected, op = gradients(direct(target), *inputs()), gradients(registered(target), *inputs())
    for mine, theirs in zip(op, expected, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.dtype == theirs.dtype


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_opcheck(target: Target, with_bias: bool) -> None:
    x, bias, dy = inputs()
    options = ("gelu", True, target.backend)
    with target.active():
        leaf = leaves(bias)[0] if with_bias else None
        torch.library.opcheck(torch.ops.lmkern.activation.default, (*leaves(x), leaf, *options))
        for needs in ([True, with_bias], [False, with_bias]):
            arguments = (dy, x, bias if with_bias else None, *options, needs)
            torch.library.opcheck(torch.ops.lmkern.activation_backward.default, arguments)


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_compiled_is_bit_equal_to_eager_and_compiled_once_more_for_other_batches(target: Target) -> None:
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = torch.compile(direct(target), fullgraph=True, backend=counter)
    with target.active():
        for rows in (20, 30, 50, 70):
            eager, mine = gradients(direct(target), *inputs(rows)), gradients(call, *inputs(rows))
            assert all(torch.equal(a, b) for a, b in zip(mine, eager, strict=True))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_double_backward_is_refused(target: Target, path: str) -> None:
    torch.compiler.reset()
    x, bias = leaves(*inputs()[:2])
    with target.active():
        y = PATHS[path](target)(x, bias)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        # The first term has a gradient of its own: a second one left out would go unnoticed.
        loss = y.sum() + dx.square().sum()
        with pytest.raises(
            RuntimeError, match=r"(?i)once_differentiable|double backward|no autograd formula"
        ):
            loss.backward()


def test_meta_tensors_give_shapes() -> None:
    x = torch.zeros(2, 3, 6, device="meta", dtype=torch.bfloat16)
    y = lmkern.swiglu(x)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 3), x.dtype, "meta")
