"""`lmkern.attention` as a citizen of torch: registration, compilation, transforms, double backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import lmkern
from lmkern.ops import alibi
from lmkern.testing import (
    ATTENTION_FEATURES,
    AttentionFeatures,
    AttentionShape,
    Target,
    attention_inputs,
    attention_options,
    attention_results,
    leaves,
    our_attention,
    targets,
)

TARGETS = targets("attention")
IN_FLOAT32 = [target for target in TARGETS if target.takes(torch.float32)]
SHAPE = AttentionShape(2, 4, 20, 16, 30, 2, causal=True)
# softmax_scale, left, right, top_left, softcap, dropout_p, exact_lse and no tensors: causal.
OPTIONS = (0.25, None, 0, False, 0.0, 0.0, True, *[None] * 7)
# Without and with everything that there is, and packed.
FEATURES = (
    AttentionFeatures(),
    ATTENTION_FEATURES[-1],
    AttentionFeatures(documents=((5, 9), (0, 1), (15, 20)), window=(6, 2), sinks=True, relative_bias="H"),
)
CASES = [(t, f) for t in TARGETS for f in FEATURES if t.takes(torch.float32, options=f.kernel_options())]


def shape_with(target: Target, features: AttentionFeatures, B: int = 2) -> AttentionShape:
    shape = AttentionShape(1 if features.documents else B, 4, 20, 16, 30, 2, causal=not features.window)
    return target.lighter(shape)


def registered(target: Target) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.lmkern.attention(q, k, v, *OPTIONS, target.backend)
        return out, lse

    return call


def flat(features: AttentionFeatures, options: dict[str, Any]) -> list[Any]:
    """The registered op's arguments behind q, k and v, but for backend."""
    left, right = features.window or (None, 0)
    relative_bias = options.get("relative_bias")
    if "alibi_slopes" in options:
        assert relative_bias is not None
        relative_bias = relative_bias + alibi(options["alibi_slopes"], 30, 30)
    return [
        0.25, left, right, False, features.softcap or 0.0, features.dropout_p, True,
        options.get("dropout_seed"),
        options.get("bias"), options.get("mask"), relative_bias, options.get("sinks"),
        options.get("cu_seqlens"), options.get("cu_seqlens_k"),
    ]  # fmt: skip


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


@pytest.mark.parametrize(("target", "features"), CASES, ids=str)
def test_direct_path_is_bit_equal_to_the_registered_op_with_every_feature(
    target: Target, features: AttentionFeatures
) -> None:
    shape = shape_with(target, features)
    inputs = attention_inputs(shape, device=target.device)
    options = attention_options(shape, features, device=target.device)

    def op(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.lmkern.attention(q, k, v, *flat(features, options), target.backend)
        return out, lse

    dlse = torch.randn(shape.B, shape.H, 20).to(target.device)
    with target.active():
        direct = attention_results(our_attention(shape, target.backend), *inputs, dlse, options)
        through_op = attention_results(op, *inputs, dlse, options)
    for result, value in direct.items():
        assert torch.equal(value, through_op[result]), result
        assert value.stride() == through_op[result].stride(), result


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize(("target", "features"), CASES, ids=str)
def test_opcheck(target: Target, features: AttentionFeatures, layout: str) -> None:
    shape = shape_with(target, features)
    q, k, v, dout = attention_inputs(shape, device=target.device, layout=layout)
    options = flat(features, attention_options(shape, features, device=target.device))
    given = [isinstance(x, Tensor) and x.is_floating_point() for x in options]
    wanting = [leaves(x)[0] if floating else x for x, floating in zip(options, given, strict=True)]
    with target.active():
        out, lse = torch.ops.lmkern.attention(q, k, v, *options, target.backend)
        torch.library.opcheck(
            torch.ops.lmkern.attention.default, (*leaves(q, k, v), *wanting, target.backend)
        )
        # bias, relative_bias and sinks.
        others = [given[8], given[10], given[11]]
        for needs in ([True, True, True, *others], [False, True, False, False, False, others[2]]):
            arguments = (dout, None, q, k, v, out, lse, *options, target.backend, needs)
            torch.library.opcheck(torch.ops.lmkern.attention_backward.default, arguments)


@pytest.mark.parametrize(("target", "features"), CASES, ids=str)
def test_compiled_is_bit_equal_to_eager_and_compiled_once_more_for_other_batches(
    target: Target, features: AttentionFeatures
) -> None:
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = our_attention(shape_with(target, features), target.backend)
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    with target.active():
        # The second makes the batch a variable, the third is the first that must not compile anew.
        for B in (2, 3, 5) if target.slow else (2, 3, 5, 7):
            shape = shape_with(target, features, B)
            inputs = attention_inputs(shape, device=target.device)
            options = attention_options(shape, features, device=target.device)
            eager = attention_results(call, *inputs, options=options)
            for result, value in attention_results(compiled, *inputs, options=options).items():
                assert torch.equal(value, eager[result]), result
    assert counter.frame_count <= 2


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled_with_a_seed_from_the_generator(backend: str) -> None:
    torch.compiler.reset()
    n = 40
    q, v = torch.zeros(1, 2, n, n), torch.eye(n).expand(1, 2, n, n)

    def call(q: Tensor, v: Tensor) -> Tensor:
        out = lmkern.attention(q, q, v, dropout_p=0.5)
        assert isinstance(out, Tensor)
        return out

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    first, second = compiled(q, v), compiled(q, v)
    assert 0.4 < (first == 0).double().mean() < 0.6
    assert not torch.equal(first, second)
    q, v = leaves(q, v)
    out = compiled(q, v)
    out.backward(torch.eye(n).expand(1, 2, n, n))
    assert v.grad is not None
    assert torch.equal(v.grad.mT != 0, out != 0)


# torch's own, while inductor is imported.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_compiled_by_inductor_is_bit_equal_to_eager(features: AttentionFeatures) -> None:
    torch.compiler.reset()
    shape = shape_with(Target("attention", "cpu"), features)
    inputs = attention_inputs(shape, layout="transposed")
    options = attention_options(shape, features)
    # Not the slopes: inductor makes the vector of them in one step more.
    options.pop("alibi_slopes", None)
    call = our_attention(shape)
    compiled = torch.compile(call, fullgraph=True)
    eager = attention_results(call, *inputs, options=options)
    for result, value in attention_results(compiled, *inputs, options=options).items():
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
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
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
