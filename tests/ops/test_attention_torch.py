"""`lmkern.attention` as a citizen of torch: registration, compilation, transforms, double backward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lmkern
from lmkern.testing import (
    AttentionShape,
    Target,
    attention_inputs,
    attention_results,
    leaves,
    our_attention,
    targets,
)

TARGETS = targets("attention")
SHAPE = AttentionShape(2, 4, 20, 16, 30, 2, causal=True)
# softmax_scale, left, right, top_left, softcap, dropout_p and no tensors: causal.
OPTIONS = (0.25, None, 0, False, 0.0, 0.0, *[None] * 7)


def registered(target: Target) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.lmkern.attention(q, k, v, *OPTIONS, target.backend)
        return out, lse

    return call


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded_heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_direct_path_is_bit_equal_to_the_registered_op(
    target: Target, dtype: torch.dtype, layout: str
) -> None:
    inputs = attention_inputs(SHAPE, dtype, device=target.device, layout=layout)
    dlse = torch.randn(2, 4, 20).to(target.device)
    with target.active():
        direct = attention_results(our_attention(SHAPE, target.backend), *inputs, dlse)
        op = attention_results(registered(target), *inputs, dlse)
    for result, value in direct.items():
        assert torch.equal(value, op[result]), result
        assert value.stride() == op[result].stride(), result


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_opcheck(target: Target, layout: str) -> None:
    q, k, v, dout = attention_inputs(SHAPE, device=target.device, layout=layout)
    with target.active():
        out, lse = registered(target)(q, k, v)
        torch.library.opcheck(
            torch.ops.lmkern.attention.default, (*leaves(q, k, v), *OPTIONS, target.backend)
        )
        for needs in ([True, True, True], [False, True, False]):
            arguments = (dout, None, q, k, v, out, lse, *OPTIONS, target.backend, needs + [False] * 3)
            torch.library.opcheck(torch.ops.lmkern.attention_backward.default, arguments)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_compiled_is_bit_equal_to_eager_and_compiled_once_more_for_other_batches(target: Target) -> None:
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = our_attention(SHAPE, target.backend)
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    with target.active():
        for B in (2, 3, 5, 7):
            shape = AttentionShape(B, 4, 20, 16, 30, 2, causal=True)
            inputs = attention_inputs(shape, device=target.device)
            eager = attention_results(call, *inputs)
            for result, value in attention_results(compiled, *inputs).items():
                assert torch.equal(value, eager[result]), result
    assert counter.frame_count <= 2


# torch's own, while inductor is imported.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled_by_inductor_is_bit_equal_to_eager() -> None:
    torch.compiler.reset()
    inputs = attention_inputs(SHAPE, layout="transposed")
    call = our_attention(SHAPE)
    compiled = torch.compile(call, fullgraph=True)
    eager = attention_results(call, *inputs)
    for result, value in attention_results(compiled, *inputs).items():
        assert torch.equal(value, eager[result]), result


@pytest.mark.parametrize("wanted", [(False, False, True), (True, False, False)])
def test_compiled_with_some_gradients(wanted: tuple[bool, ...]) -> None:
    torch.compiler.reset()
    *inputs, dout = attention_inputs(SHAPE)
    call = our_attention(SHAPE)
    gradients = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        arguments = [x.clone().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
        function(*arguments)[0].backward(dout)
        gradients.append([x.grad for x in arguments])
    for eager, compiled, want in zip(*gradients, wanted, strict=True):
        assert (compiled is not None) == want
        assert not want or torch.equal(eager, compiled)


def test_compiled_under_autocast() -> None:
    torch.compiler.reset()
    q, k, v, _ = attention_inputs(SHAPE)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return lmkern.attention(q, k, v, causal=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
    assert compiled.dtype == torch.bfloat16
    assert torch.equal(compiled, call(q, k, v))


def test_gradient_by_function_transform_is_refused_by_torch() -> None:
    q, k, v, _ = attention_inputs(SHAPE)
    # torch has no such transform of registered ops; what counts is that no wrong gradient comes back.
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda q: lmkern.attention(q, k, v).sum())(q)


def test_vmap_is_a_loop() -> None:
    q, k, v, _ = attention_inputs(SHAPE)
    queries = torch.stack([q, q + 1, q * 2])
    mapped = torch.func.vmap(lambda q: lmkern.attention(q, k, v))(queries)
    assert torch.equal(mapped, torch.stack([lmkern.attention(q, k, v) for q in queries]))


def test_no_graph_is_kept_where_none_is_wanted() -> None:
    q, k, v, _ = attention_inputs(SHAPE)
    assert not lmkern.attention(q, k, v).requires_grad
    with torch.no_grad():
        assert not lmkern.attention(*leaves(q, k, v)).requires_grad


# The direct path has a double backward: test_attention_double_backward.py.
PATHS = {
    "registered": registered,
    "compiled": lambda target: torch.compile(
        our_attention(SHAPE, target.backend), fullgraph=True, backend="aot_eager"
    ),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_double_backward_is_refused(target: Target, path: str) -> None:
    torch.compiler.reset()
    q, k, v, _ = attention_inputs(SHAPE, device=target.device)
    q, k, v = leaves(q, k, v)
    with target.active():
        out, _ = PATHS[path](target)(q, k, v)
        (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        # The first term has a gradient of its own: a second one left out would go unnoticed.
        loss = out.sum() + dq.square().sum()
        with pytest.raises(
            RuntimeError, match=r"(?i)once_differentiable|double backward|no autograd formula"
        ):
            loss.backward()
