"""The losses as citizens of torch: registration, compilation, double backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lmkern
from lmkern.testing import (
    CrossEntropyShape,
    LinearCrossEntropyShape,
    Target,
    cross_entropy_inputs,
    leaves,
    linear_cross_entropy_inputs,
    targets,
)

TARGETS = targets("cross_entropy")
IN_FLOAT32 = [target for target in TARGETS if target.takes(torch.float32)]
OPTIONS = (-100, 0.1, 1e-3, 5.0)
NAMED = dict(zip(("ignore_index", "label_smoothing", "z_loss", "softcap"), OPTIONS, strict=True))
REDUCTIONS = ("mean", "sum", "none")

Call = Callable[..., Tensor]


def inputs(op: str, rows: int = 20, dtype: torch.dtype = torch.bfloat16) -> tuple[list[Tensor], Tensor]:
    """The tensors that have gradients, and the targets."""
    if op == "cross_entropy":
        logits, y, _ = cross_entropy_inputs(CrossEntropyShape(rows, 33), dtype)
        return [logits], y
    *tensors, y = linear_cross_entropy_inputs(LinearCrossEntropyShape(rows, 33, 17), dtype)
    return tensors, y


def direct(op: str, reduction: str, target: Target) -> Call:
    options: dict[str, Any] = {**NAMED, "reduction": reduction, "backend": target.backend}
    if op == "cross_entropy":
        return lambda logits, y: lmkern.cross_entropy(logits, y, **options)
    return lambda x, weight, bias, y: lmkern.linear_cross_entropy(x, weight, y, bias=bias, **options)


def registered(op: str, reduction: str, target: Target) -> Call:
    """The same through the dispatcher, as a compiler sees it."""

    def call(*arguments: Tensor) -> Tensor:
        *tensors, y = arguments
        if op == "linear_cross_entropy":
            needs = [int(reduction != "none")] * 3
            return torch.ops.lmkern.linear_cross_entropy(
                *tensors, y, *OPTIONS, reduction, needs, target.backend
            )[0]
        loss = torch.ops.lmkern.cross_entropy(*tensors, y, *OPTIONS, target.backend)[0]
        return {"mean": loss.mean, "sum": loss.sum, "none": loss.clone}[reduction]()

    return call


def compiled(op: str, reduction: str, target: Target) -> Call:
    return torch.compile(direct(op, reduction, target), fullgraph=True, backend="aot_eager")


PATHS = {"direct": direct, "registered": registered, "compiled": compiled}
OPS = ("cross_entropy", "linear_cross_entropy")


def results(call: Call, tensors: list[Tensor], y: Tensor) -> tuple[Tensor, ...]:
    tensors = list(leaves(*tensors))
    loss = call(*tensors, y)
    dloss = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return loss.detach(), *torch.autograd.grad(loss, tensors, dloss)


@pytest.mark.parametrize("path", ["registered", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("op", OPS)
def test_every_path_gives_the_same_bits(op: str, reduction: str, dtype: torch.dtype, path: str) -> None:
    torch.compiler.reset()
    tensors, y = inputs(op, dtype=dtype)
    with TARGETS[0].active():
        right = results(direct(op, reduction, TARGETS[0]), tensors, y)
        mine = results(PATHS[path](op, reduction, TARGETS[0]), tensors, y)
    for a, b in zip(mine, right, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_opcheck(target: Target) -> None:
    (logits,), y = inputs("cross_entropy", dtype=torch.float32)
    ops = torch.ops.lmkern
    with target.active():
        arguments = (*leaves(logits), y, *OPTIONS, target.backend)
        torch.library.opcheck(ops.cross_entropy.default, arguments)
        loss, *statistics = ops.cross_entropy(logits, y, *OPTIONS, target.backend)
        arguments = (torch.ones_like(loss), logits, y, *statistics, *OPTIONS, target.backend)
        torch.library.opcheck(ops.cross_entropy_backward.default, arguments)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("target", [TARGETS[0], TARGETS[-1]], ids=str)
def test_opcheck_of_the_linear_one(target: Target, reduction: str, with_bias: bool) -> None:
    (x, weight, bias), y = inputs("linear_cross_entropy", dtype=torch.float32)
    early = [reduction != "none"] * 2 + [reduction != "none" and with_bias]
    rest = [bias] if with_bias else [None]
    ops = torch.ops.lmkern
    with target.active():
        parameters = leaves(x, weight, *[bias] * with_bias)
        given = (*parameters, *[None] * (3 - len(parameters)))
        torch.library.opcheck(
            ops.linear_cross_entropy.default, (*given, y, *OPTIONS, reduction, early, target.backend)
        )
        tensors = (x, weight, *rest, y, *OPTIONS, reduction)
        loss, *gradients = ops.linear_cross_entropy(*tensors, early, target.backend)
        torch.library.opcheck(
            ops.linear_cross_entropy_backward.default,
            (torch.ones_like(loss), *gradients, *tensors, early, [True, False, with_bias], target.backend),
        )


@pytest.mark.parametrize("op", OPS)
def test_compiled_once_more_for_other_batches(op: str) -> None:
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    eager = direct(op, "mean", TARGETS[0])
    call = torch.compile(eager, fullgraph=True, backend=counter)
    for rows in (20, 30, 50, 70):
        tensors, y = inputs(op, rows)
        for a, b in zip(results(call, tensors, y), results(eager, tensors, y), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("op", OPS)
def test_double_backward_is_refused(op: str, reduction: str, path: str) -> None:
    torch.compiler.reset()
    tensors, y = inputs(op, dtype=torch.float32)
    tensors = list(leaves(*tensors))
    loss = PATHS[path](op, reduction, TARGETS[0])(*tensors, y).flatten()
    # Not sum(), whose gradient has stride 0: torch.compile's own backward fails on that with create_graph.
    loss = loss @ torch.ones_like(loss)
    (gradient,) = torch.autograd.grad(loss.square(), tensors[0], create_graph=True)
    # The first term has a gradient of its own: a second one left out would go unnoticed.
    total = loss + gradient.square().sum()
    with pytest.raises(RuntimeError, match=r"(?i)once_differentiable|double backward|no autograd formula"):
        total.backward()
