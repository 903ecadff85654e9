"""A second derivative is computed or refused: never a part of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lmkern
from lmkern.testing import seeded_randn

TOKENS = torch.tensor([0, 1, 2])
Op = Callable[[Tensor, Tensor], Tensor]

# Of x (3, 6) and a weight (5, 6): each with an incoming gradient that has no graph of its own.
REFUSED: dict[str, Op] = {
    "rms_norm": lambda x, weight: lmkern.rms_norm(x, 6, weight[0]).sum(),
    "add_norm": lambda x, weight: lmkern.add_norm(x, x, weight[0])[0].sum(),
    "gelu": lambda x, weight: lmkern.gelu(x, weight[0]).sum(),
    "swiglu": lambda x, weight: lmkern.swiglu(x, weight[0]).sum(),
    "cross_entropy": lambda x, weight: lmkern.cross_entropy(x * weight[:3], TOKENS),
    "linear_cross_entropy": lambda x, weight: lmkern.linear_cross_entropy(x, weight, TOKENS),
}
SERVED: dict[str, Op] = {
    "layer_norm": lambda x, weight: lmkern.layer_norm(x, 6, weight[0]).square().sum(),
    "attention": lambda x, weight: lmkern.attention(*(t[None, None] for t in (x, x, weight[:3]))).sum(),
    "rotary": lambda x, weight: (
        lmkern.rotary(x[None, None], weight.detach()[:3, :3], weight.detach()[:3, 3:]).pow(3).sum()
    ),
    "cast": lambda x, weight: (lmkern.cast(x, torch.float64) ** 3).sum(),
    "linear": lambda x, weight: (lmkern.linear(x, weight) ** 3).sum(),
}  # fmt: skip


def inputs() -> tuple[Tensor, Tensor]:
    randn = seeded_randn(0, torch.float32)
    return randn(3, 6).requires_grad_(), randn(5, 6).requires_grad_()


def by_grad(loss: Tensor, leaf: Tensor) -> None:
    torch.autograd.grad(loss, leaf)


def by_backward(loss: Tensor, leaf: Tensor) -> None:
    loss.backward()


@pytest.mark.parametrize("differentiate", [by_grad, by_backward])
@pytest.mark.parametrize("of", ["a leaf", "what was computed"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_second_derivative_is_refused(name: str, of: str, differentiate: Callable[..., None]) -> None:
    for wanted in range(2):
        leaves = inputs()
        given = leaves if of == "a leaf" else tuple(t * t for t in leaves)
        loss = REFUSED[name](*given)
        (gradient,) = torch.autograd.grad(loss, leaves[wanted], create_graph=True)
        with pytest.raises(RuntimeError, match=r"have no derivative .*once_differentiable"):
            differentiate(gradient.square().sum(), leaves[wanted])


@pytest.mark.parametrize("name", REFUSED)
def test_a_graph_that_nobody_differentiates_changes_no_gradient(name: str) -> None:
    leaves = inputs()
    plain = torch.autograd.grad(REFUSED[name](*leaves), leaves)
    with_graph = torch.autograd.grad(REFUSED[name](*leaves), leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, with_graph, strict=True))


@pytest.mark.parametrize("name", SERVED)
def test_a_second_derivative_is_that_of_differences(name: str) -> None:
    def gradient(at: Tensor) -> Tensor:
        leaf = at.detach().requires_grad_()
        return torch.autograd.grad(SERVED[name](leaf, weight), leaf)[0].double()

    x, weight = inputs()
    direction = seeded_randn(1, torch.float32)(3, 6)
    (first,) = torch.autograd.grad(SERVED[name](x, weight), x, create_graph=True)
    (second,) = torch.autograd.grad(first, x, direction)
    step = 1e-2
    differences = (gradient(x + step * direction) - gradient(x - step * direction)) / (2 * step)
    torch.testing.assert_close(second.double(), differences, rtol=2e-2, atol=2e-2)


def test_a_third_derivative_is_refused() -> None:
    for name in ("layer_norm", "attention"):
        x, weight = inputs()
        derivative = SERVED[name](x, weight)
        for _ in range(2):
            (derivative,) = torch.autograd.grad(derivative.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{name}'s backward have no derivative"):
            torch.autograd.grad(derivative.sum(), x)


@pytest.mark.parametrize("name", REFUSED)
def test_a_checkpoint_is_read_once(name: str) -> None:
    leaves = inputs()
    plain = torch.autograd.grad(REFUSED[name](*leaves), leaves[0])
    loss = checkpoint(REFUSED[name], *leaves, use_reentrant=False)
    (gradient,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    assert torch.equal(gradient, plain[0])
    with pytest.raises(RuntimeError, match="have no derivative"):
        gradient.sum().backward()
