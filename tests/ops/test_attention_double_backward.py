"""Double backward of `lmkern.attention` in eager mode: the derivative of its gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lmkern
from lmkern.testing import (
    ATTENTION_FEATURES,
    AttentionFeatures,
    AttentionShape,
    Target,
    attention_inputs,
    attention_options,
    leaves,
    our_attention,
    targets,
    torchs_formula,
)

TARGETS = targets("attention")
IN_FLOAT32 = [target for target in TARGETS if target.takes(torch.float32)]
# More keys than queries; more queries than keys, so that the first see nothing.
SHAPES = (AttentionShape(1, 2, 3, 4, 5, 1), AttentionShape(1, 2, 5, 3, 4, 2, causal=True))
FEATURES = (
    AttentionFeatures(),
    *ATTENTION_FEATURES,
    AttentionFeatures(
        documents=((2, 1), (1, 0), (0, 2), (2, 3)), window=(1, 0), sinks=True, relative_bias="1"
    ),
)
CASES = [
    (t, f)
    for t in TARGETS
    for f in FEATURES
    if t.takes(torch.float64, options=f.kernel_options(torch.float64))
]


def differentiable(
    call: Callable[..., tuple[Tensor, Tensor]], options: dict[str, Any]
) -> tuple[Callable[..., tuple[Tensor, Tensor]], list[Tensor]]:
    """call as a function of q, k, v and the options' floating tensors, and those."""
    names = [n for n, x in options.items() if isinstance(x, Tensor) and x.is_floating_point()]

    def of_tensors(q: Tensor, k: Tensor, v: Tensor, *further: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = call(q, k, v, **{**options, **dict(zip(names, further, strict=True))})
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    return of_tensors, [options[name] for name in names]


def case(
    shape: AttentionShape, features: AttentionFeatures, device: str
) -> tuple[AttentionShape, dict[str, Any]]:
    if features.documents:
        n_q, n_k = (sum(document[side] for document in features.documents) for side in (0, 1))
        shape = AttentionShape(1, shape.H, n_q, shape.D, n_k, shape.H_kv, shape.causal)
    return shape, attention_options(shape, features, torch.float64, device=device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("target", "features"), CASES, ids=str)
def test_gradgradcheck(target: Target, features: AttentionFeatures, shape: AttentionShape) -> None:
    torch.set_num_threads(1)
    shape, options = case(shape, features, target.device)
    call, further = differentiable(our_attention(shape, target.backend), options)
    inputs = leaves(*attention_inputs(shape, torch.float64, device=target.device)[:3], *further)
    with target.active():
        # Along one random direction: the whole Jacobian would take a minute.
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("target", "features"), CASES, ids=str)
def test_second_derivative_is_that_of_the_formula(
    target: Target, features: AttentionFeatures, shape: AttentionShape
) -> None:
    shape, options = case(shape, features, target.device)
    second = []
    for function in (our_attention(shape, target.backend), torchs_formula):
        call, further = differentiable(function, options)
        inputs = leaves(*attention_inputs(shape, torch.float64, device=target.device)[:3], *further)
        with target.active():
            out, lse = call(*inputs)
            first = torch.autograd.grad(out.square().sum() + lse.sin().sum(), inputs, create_graph=True)
            loss = sum((x.square().sum() for x in first), out.sum())
            assert isinstance(loss, Tensor)
            second.append(torch.autograd.grad(loss, inputs))
    for ours, expected in zip(*second, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_first_derivative_with_a_graph_has_the_same_bits(target: Target) -> None:
    shape = AttentionShape(2, 4, 40, 16, 50, 2, causal=True)
    *inputs, dout = attention_inputs(shape, device=target.device)
    gradients = []
    for create_graph in (False, True):
        arguments = leaves(*inputs)
        with target.active():
            out, _ = our_attention(shape, target.backend)(*arguments)
            gradients.append(torch.autograd.grad(out, arguments, dout, create_graph=create_graph))
    for without, with_graph in zip(*gradients, strict=True):
        assert torch.equal(without, with_graph)
        assert with_graph.requires_grad


@pytest.mark.parametrize("wanted", range(3))
def test_gradient_penalty_of_one_input(wanted: int) -> None:
    shape = SHAPES[0]
    second = []
    for call in (our_attention(shape), torchs_formula):
        inputs = list(attention_inputs(shape, torch.float64)[:3])
        (inputs[wanted],) = leaves(inputs[wanted])
        out, _ = call(*inputs)
        (first,) = torch.autograd.grad(out.square().sum(), inputs[wanted], create_graph=True)
        (gradient,) = torch.autograd.grad(first.square().sum(), inputs[wanted])
        second.append(gradient)
    torch.testing.assert_close(*second, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["bias", "sinks"])
def test_rows_that_see_nothing_leave_the_rest_finite(name: str) -> None:
    shape = SHAPES[1]
    q, k, v = leaves(*attention_inputs(shape, torch.float64)[:3])
    option = torch.zeros(5, 4, dtype=torch.float64) if name == "bias" else torch.zeros(2, dtype=torch.float64)
    (option,) = leaves(option.index_fill(0, torch.tensor([1]), -torch.inf))
    out, lse = our_attention(shape)(q, k, v, **{name: option})
    loss = out.square().sum() + lse.masked_fill(lse == -torch.inf, 0.0).sum()
    first = torch.autograd.grad(loss, (q, k, v, option), create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), (q, k, v, option))
    for gradient in (*first, *second):
        assert gradient.isfinite().all()
        assert gradient.any()


def test_gradient_of_lse_alone_twice() -> None:
    shape, second = SHAPES[0], []
    for call in (our_attention(shape), torchs_formula):
        q, k, v = leaves(*attention_inputs(shape, torch.float64)[:3])
        _, lse = call(q, k, v)
        (first,) = torch.autograd.grad(lse.square().sum(), q, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), (q, k)))
    for ours, expected in zip(*second, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    shape = AttentionShape(1, 2, 20, 8, 20, 2, causal=True)
    *inputs, dout = attention_inputs(shape, dtype)
    second = []
    for cast in (dtype, torch.float64):
        arguments = leaves(*(x.to(cast) for x in inputs))
        out, _ = our_attention(shape)(*arguments)
        first = torch.autograd.grad(out, arguments, dout.to(cast), create_graph=True)
        second.append(torch.autograd.grad(first, arguments, [torch.ones_like(x) for x in first]))
    for ours, exact in zip(*second, strict=True):
        assert ours.dtype == dtype
        scale = exact.abs().max().item()
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=32 * torch.finfo(dtype).eps * scale)


def test_triple_backward_is_refused() -> None:
    q, k, v = leaves(*attention_inputs(SHAPES[0], torch.float64)[:3])
    out = lmkern.attention(q, k, v)
    assert isinstance(out, Tensor)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second.sum().backward()
