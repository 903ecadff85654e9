"""What torch's transforms make of each op: at most two graphs over changing batch sizes, gradients by
torch.func and in batches, no forward mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad

import lmkern

# The first size is compiled for itself, the second shows which dimension changes. To torch a size of 1 is a
# graph of its own.
BATCHES = (2, 3, 5, 8, 13)
# From a batch size to the arguments of a call of the op with a backend.
Make = Callable[[int], tuple[Any, ...]]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def tokens(*shape: int) -> Tensor:
    return torch.randint(7, shape)


ANGLES = torch.rand(6, 4)
CALLS: dict[str, tuple[Callable[..., Any], Make]] = {
    "attention": (
        partial(lmkern.attention, causal=True),
        lambda B: tuple(randn(B, 4, 6, 8) for _ in range(3)),
    ),
    "cached_attention": (
        lmkern.cached_attention,
        lambda B: tuple(torch.randn(B, 4, n, 8) for n in (1, 6, 6)),
    ),
    "layer_norm": (lmkern.layer_norm, lambda B: (randn(B, 6, 8), (8,), randn(8), randn(8))),
    "rms_norm": (lmkern.rms_norm, lambda B: (randn(B, 6, 8), (8,), randn(8))),
    "add_norm": (lmkern.add_norm, lambda B: (randn(B, 6, 8), randn(B, 6, 8), randn(8), randn(8))),
    "cross_entropy": (lmkern.cross_entropy, lambda B: (randn(6 * B, 7), tokens(6 * B))),
    "linear_cross_entropy": (
        lmkern.linear_cross_entropy,
        lambda B: (randn(6 * B, 8), randn(7, 8), tokens(6 * B)),
    ),
    "rotary": (lmkern.rotary, lambda B: (randn(B, 4, 6, 8), ANGLES.cos(), ANGLES.sin())),
    "gelu": (lmkern.gelu, lambda B: (randn(B, 6, 8), randn(8))),
    "swiglu": (lmkern.swiglu, lambda B: (randn(B, 6, 8), randn(8))),
    "embedding": (lmkern.embedding, lambda B: (tokens(B, 6), randn(7, 8))),
    "cast": (partial(lmkern.cast, dtype=torch.bfloat16), lambda B: (torch.randn(B, 8),)),
    "transposed_copy": (lmkern.transposed_copy, lambda B: (torch.randn(6 * B, 8),)),
}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def graphs(call: Callable[..., Any], make: Make, device: str) -> int:
    """Graphs that were compiled over the batch sizes, forward and backward."""
    counter = CompileCounter()
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for B in BATCHES:
        arguments = [x.to(device) if isinstance(x, Tensor) else x for x in make(B)]
        result = compiled(*arguments)
        first = result if isinstance(result, Tensor) else result[0]
        if first.requires_grad:
            first.sum().backward()
    return counter.frame_count


@pytest.mark.parametrize("name", CALLS)
def test_changing_batch_sizes_compile_at_most_once_more(name: str) -> None:
    assert graphs(*CALLS[name], "cpu") <= 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and none is visible")
@pytest.mark.parametrize("name", CALLS)
def test_changing_batch_sizes_compile_at_most_once_more_on_a_gpu(name: str) -> None:
    assert graphs(*CALLS[name], "cuda") <= 2


def test_recompilations_are_counted() -> None:
    def with_its_own_graph(x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] % 2 else x + 1

    assert graphs(with_its_own_graph, lambda B: (torch.randn(B, 2),), "cpu") > 2


def of_one(name: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The op as a function of its first tensor of numbers, and that tensor."""
    call, make = CALLS[name]
    arguments = make(2)
    i = next(i for i, x in enumerate(arguments) if isinstance(x, Tensor) and x.is_floating_point())

    def function(x: Tensor) -> Tensor:
        result = call(*arguments[:i], x, *arguments[i + 1 :])
        return result if isinstance(result, Tensor) else result[0]

    return function, arguments[i].detach()


@pytest.mark.parametrize("name", CALLS)
def test_vmap_is_a_loop_with_its_gradient(name: str) -> None:
    function, x = of_one(name)
    x = torch.stack([x, x + 1]).requires_grad_(name != "cached_attention")
    results = torch.func.vmap(function)(x), torch.stack([function(each) for each in x])
    assert torch.equal(*results)
    if x.requires_grad:
        assert torch.equal(*(torch.autograd.grad(result.float().square().sum(), x)[0] for result in results))


DIFFERENTIABLE = [name for name in CALLS if name != "cached_attention"]
# Whose gradients are the op once more, and have a derivative.
LINEAR = ("rotary", "cast", "transposed_copy")
# Whose double backward goes through a formula.
TWICE = ("attention", "layer_norm", *LINEAR)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_function_gradients_are_those_of_autograd(name: str) -> None:
    function, x = of_one(name)

    def loss(x: Tensor) -> Tensor:
        return function(x).float().square().sum()

    def expected(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    batch = torch.stack([x, x + 1, x * 2])
    assert torch.equal(torch.func.grad(loss)(x), expected(x))
    of_each = torch.func.vmap(torch.func.grad(loss))
    assert torch.equal(of_each(batch), torch.stack([expected(each) for each in batch]))
    assert torch.equal(torch.func.vmap(of_each)(batch[None]), of_each(batch)[None])
    if name != "cross_entropy":  # torch divides by a number in no batch of 0
        assert of_each(batch[:0]).shape == (0, *x.shape)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_jacobians_are_those_of_a_loop(name: str) -> None:
    function, x = of_one(name)

    def some(x: Tensor) -> Tensor:
        return function(x).float().flatten()[-5:]

    expected = torch.autograd.functional.jacobian(some, x)
    assert expected.any()
    assert torch.equal(torch.func.jacrev(some)(x), expected)
    assert torch.equal(torch.autograd.functional.jacobian(some, x, vectorize=True), expected)
    leaf = x.requires_grad_()
    y = some(leaf)

    def product(direction: Tensor) -> Tensor:
        return torch.autograd.grad(y, leaf, direction, retain_graph=True)[0]

    assert torch.equal(torch.func.vmap(product)(torch.eye(len(y))), expected)
    twice = torch.eye(len(y)).expand(2, -1, -1)
    assert torch.equal(torch.func.vmap(torch.func.vmap(product))(twice), torch.stack([expected] * 2))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_are_right_or_refused(name: str) -> None:
    function, x = of_one(name)
    x = x.flatten()[:8].clone() if name in LINEAR else x

    def loss(x: Tensor) -> Tensor:
        return function(x.reshape(1, 1, 1, 8) if name in LINEAR else x).float().square().sum()

    def twice() -> Tensor:
        return torch.func.jacrev(torch.func.grad(loss))(x)

    def by_autograd() -> Tensor:
        return torch.autograd.functional.hessian(loss, x, vectorize=True)

    if name in LINEAR:
        torch.testing.assert_close(twice(), 2 * torch.eye(8))
    else:
        with pytest.raises(RuntimeError, match="has no derivative of its own"):
            twice()
    if name in TWICE:
        assert torch.equal(by_autograd(), torch.autograd.functional.hessian(loss, x))
    else:
        with pytest.raises(RuntimeError, match="once_differentiable"):
            by_autograd()


def test_a_function_gradient_that_nothing_has_is_refused() -> None:
    function, x = of_one("cached_attention")
    with pytest.raises(ValueError, match="there is no gradient"):
        torch.func.grad(lambda x: function(x).sum())(x)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_zeros_without_memory_are_gradients(name: str) -> None:
    function, x = of_one(name)
    y = function(x.requires_grad_())
    assert not torch.autograd.grad(y, x, torch._efficientzerotensor(y.shape, dtype=y.dtype))[0].any()


def dual(x: Any) -> Any:
    floating = isinstance(x, Tensor) and x.is_floating_point()
    return forward_ad.make_dual(x.detach(), torch.ones_like(x)) if floating else x


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_is_refused_and_gives_no_zero_tangent(name: str) -> None:
    """To torch.func.jvp a registered op has a tangent, of zeros, unless it is refused before."""
    call, make = CALLS[name]
    arguments = make(2)
    floating = [i for i, x in enumerate(arguments) if isinstance(x, Tensor) and x.is_floating_point()]
    for i in floating:

        def of_one(x: Tensor, i: int = i) -> Any:
            return call(*arguments[:i], x, *arguments[i + 1 :])

        x = arguments[i].detach()
        for transform in (of_one, torch.func.vmap(lambda x: of_one(x[0]), in_dims=0)):
            given = x if transform is of_one else x[None, None]
            with pytest.raises(NotImplementedError, match="expected tensors without a tangent"):
                torch.func.jvp(transform, (given,), (torch.ones_like(given),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="Use reverse mode"):
        call(*(dual(x) for x in arguments))


def test_forward_mode_leaves_constants_alone() -> None:
    x = torch.randn(2, 6, 8)
    constant = lmkern.gelu(x)
    y, tangent = torch.func.jvp(lambda y: y * lmkern.gelu(x), (x,), (x,))
    torch.testing.assert_close((y, tangent), (x * constant, x * constant))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.hessian(lambda x: lmkern.gelu(x).sum())(x)


@pytest.mark.parametrize("name", CALLS)
def test_a_trace_computes_and_does_not_remember(name: str) -> None:
    op, make = CALLS[name]
    first, second = ([each for each in make(2) if isinstance(each, Tensor)] for _ in range(2))
    others = [each for each in make(2) if not isinstance(each, Tensor)]

    def of_tensors(*tensors: Tensor) -> Any:
        return op(tensors[0], *others, *tensors[1:])

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(of_tensors, first, check_trace=False)
    assert "lmkern::" in str(traced.graph)
    with torch.no_grad():
        torch.testing.assert_close(traced(*second), of_tensors(*second))


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_traced_loss_has_its_gradients(reduction: str, wanted: bool) -> None:
    def loss(x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        return lmkern.linear_cross_entropy(x, weight, y, reduction=reduction)

    first, second = ((randn(6, 8), randn(7, 8), tokens(6)) for _ in range(2))
    with torch.set_grad_enabled(wanted), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(loss, first)
    ours, theirs = (torch.autograd.grad(f(*second).sum(), second[:2]) for f in (traced, loss))
    torch.testing.assert_close(ours, theirs)
