"""Values and gradients of `lmkern.attention` on every backend, against float64."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lmkern
from lmkern.testing import (
    ALONE,
    ATTENTION_SHAPES,
    LAYOUTS,
    AttentionShape,
    Errors,
    Target,
    attention_inputs,
    attention_results,
    attention_results_and_alone,
    exact_attention,
    leaves,
    mean_verdicts,
    measure,
    our_attention,
    poisoned_memory,
    targets,
    torchs_attention,
    verdicts,
)
from lmkern.testing import exact as long_double

TARGETS = targets("attention")
IN_FLOAT32 = [target for target in TARGETS if target.takes(torch.float32)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TARGETS_DTYPES = [(target, dtype) for target in TARGETS for dtype in DTYPES if target.takes(dtype)]

# Elements of an intermediate product that numpy's long doubles do in about a second.
LONG_DOUBLE_PRODUCTS = 4_000_000
# 64 x 64 tiles that Triton's interpreter does in about a second.
INTERPRETED_TILES = 16


def shapes(target: Target, dtype: torch.dtype) -> list[AttentionShape]:
    """Those that take no more than about a second each; of the interpreter's every second or fourth."""
    if target.slow:
        small = [
            shape
            for shape in ATTENTION_SHAPES
            if shape.B * shape.H * -(-shape.N_q // 64) * -(-shape.N_k // 64) <= INTERPRETED_TILES
        ]
        return small[:: -2 if dtype == torch.float32 else -4]
    if dtype == torch.float64:
        return [shape for shape in ATTENTION_SHAPES if shape.scores * shape.D <= LONG_DOUBLE_PRODUCTS]
    return list(ATTENTION_SHAPES)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def ids(value: object) -> str:
    return name(value) if isinstance(value, torch.dtype) else str(value)


# The reference is the formula in torch's own operations: what it must be is right, not better than torch.
KERNELS_DTYPES = [(target, dtype) for target, dtype in TARGETS_DTYPES if target.backend != "reference"]
CASES = [(target, dtype, shape) for target, dtype in KERNELS_DTYPES for shape in shapes(target, dtype)]


def widest(target: Target) -> torch.dtype:
    return torch.float64 if target.takes(torch.float64) else torch.float32


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """For results that differ by the order of sums alone."""
    eps = torch.finfo(dtype).eps
    return {"rtol": 64 * eps, "atol": 64 * eps}


@functools.cache
def known(
    dtype: torch.dtype, shape: AttentionShape, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Torch's results and the exact ones."""
    inputs = attention_inputs(shape, dtype, seed=seed)
    exact: dict[str, object] = {**exact_attention(*inputs, shape)}
    if dtype == torch.float64:
        exact = {**long_double.attention(*inputs, shape)}
    return torchs_attention(*inputs, shape), exact


@functools.cache
def errors(target: Target, dtype: torch.dtype, shape: AttentionShape, seed: int = 0) -> dict[str, Errors]:
    inputs = attention_inputs(shape, dtype, device=target.device, seed=seed)
    q, k, v, dout = inputs
    with poisoned_memory(), target.active():
        ours = attention_results_and_alone(shape, target.backend, *inputs)
    torchs, exact = known(dtype, shape, seed)
    at_least = {}
    if shape.N_k == 1:
        # The gradient of a softmax over one key is the difference of two equal terms of this size.
        dweights = float((dout.double() * v.double()).sum(-1).abs().max()) / shape.D**0.5
        # And lse, the score itself, is the logarithm of a number about 1.
        at_least = {"dq": dweights * float(k.abs().max()), "dk": dweights * float(q.abs().max()), "lse": 1.0}
    found = {}
    for name, value in ours.items():
        result = name.removesuffix(ALONE)
        found[name] = measure(value.cpu(), torchs[result], exact[result], at_least=at_least.get(result, 0.0))
    return found


@pytest.mark.parametrize(("target", "dtype", "shape"), CASES, ids=ids)
def test_errors_are_at_most_twice_torchs(target: Target, dtype: torch.dtype, shape: AttentionShape) -> None:
    found = verdicts(functools.partial(errors, target, dtype, shape), target.units_beside)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("target", "dtype"), KERNELS_DTYPES, ids=ids)
def test_errors_over_all_shapes_are_at_most_torchs(target: Target, dtype: torch.dtype) -> None:
    draws = [functools.partial(errors, target, dtype, shape) for shape in shapes(target, dtype)]
    assert not (found := mean_verdicts(draws, target.units_beside)), "\n".join(found)


@pytest.mark.parametrize("target", [t for t in TARGETS if t.takes(torch.bfloat16)], ids=str)
def test_bounded_scores_whose_weight_one_key_has(target: Target) -> None:
    # 16 natural units above the others: no maximum is needed to bound that, and each weight may be rounded,
    # the one that matters as badly as any.
    shape = AttentionShape(1, 2, 64, 64, 64, 2, causal=False)
    *_, v, dout = attention_inputs(shape, torch.bfloat16)
    q, k = torch.zeros_like(v), torch.zeros_like(v)
    q[..., 0], k[:, :, 0, 0] = 4, 32
    inputs = (q, k, v, dout)
    exact, torchs = exact_attention(*inputs, shape), torchs_attention(*inputs, shape)
    with poisoned_memory(), target.active():
        on_device = (x.to(target.device) for x in inputs)
        ours = attention_results_and_alone(shape, target.backend, *on_device)
    for name, value in ours.items():
        # dq and dk are all cancellation.
        if (result := name.removesuffix(ALONE)) in ("out", "dv"):
            found = measure(value.cpu(), torchs[result], exact[result])
            assert found.ours_worst <= 2 * max(found.torchs_worst, 0.5), (name, found)


@pytest.mark.parametrize("shape", shapes(Target("attention", "reference"), torch.float64), ids=str)
def test_reference_agrees_with_the_formula_in_long_double(shape: AttentionShape) -> None:
    inputs = attention_inputs(shape, torch.float64)
    dlse = torch.randn(shape.B, shape.H, shape.N_q, dtype=torch.float64)
    dlse[..., : max(0, shape.N_q - shape.N_k)] = 0
    ours = exact_attention(*inputs, shape, dlse)
    exact = long_double.attention(*inputs, shape, dlse)
    for result, value in ours.items():
        expected = torch.from_numpy(exact[result].astype("float64"))
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ids)
def test_reference_computes_16_bit_inputs_in_float32(dtype: torch.dtype) -> None:
    shape = AttentionShape(1, 4, 37, 24, 50, 2, causal=True)
    q, k, v, _ = attention_inputs(shape, dtype)
    out, lse = our_attention(shape, "reference")(q, k, v)
    wide, wide_lse = our_attention(shape, "reference")(q.float(), k.float(), v.float())
    assert torch.equal(out, wide.to(dtype))
    assert torch.equal(lse, wide_lse)


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_gradient_of_lse(target: Target) -> None:
    shape, dtype = AttentionShape(1, 4, 37, 24, 50, 2, causal=True), widest(target)
    inputs = attention_inputs(shape, dtype, device=target.device)
    dlse = torch.randn(1, 4, 37, dtype=dtype).to(target.device)
    with poisoned_memory(), target.active():
        ours = attention_results(our_attention(shape, target.backend), *inputs, dlse)
    exact = exact_attention(*inputs, shape, dlse)
    for result, value in ours.items():
        torch.testing.assert_close(value, exact[result].to(dtype), **tolerance(dtype))


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_gradient_of_lse_alone(target: Target) -> None:
    shape, dtype = AttentionShape(1, 2, 37, 24, 50, 2, causal=True), widest(target)
    q, k, v, _ = attention_inputs(shape, dtype, device=target.device)
    q, k, v = leaves(q, k, v)
    with target.active():
        _, lse = lmkern.attention(q, k, v, causal=True, return_lse=True, backend=target.backend)
        dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v), materialize_grads=True)
    expected = exact_attention(q, k, v, torch.zeros_like(q), shape, torch.ones_like(lse).double())
    torch.testing.assert_close(dq, expected["dq"].to(dtype), **tolerance(dtype))
    torch.testing.assert_close(dk, expected["dk"].to(dtype), **tolerance(dtype))
    assert (dv == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_strides_are_free(target: Target, layout: str) -> None:
    shape, dtype = AttentionShape(2, 4, 37, 24, 66, 2, causal=True), widest(target)
    inputs = attention_inputs(shape, dtype, device=target.device, layout=layout)
    call = our_attention(shape, target.backend)
    with poisoned_memory(), target.active():
        ours = attention_results(call, *inputs)
        contiguous = attention_results(call, *(x.contiguous() for x in inputs))
    for result, value in ours.items():
        torch.testing.assert_close(value, contiguous[result], **tolerance(dtype))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "columns"])
@pytest.mark.parametrize("target", [t for t in TARGETS if t.backend == "cpu"], ids=str)
def test_large_results_have_the_bits_of_their_parts(target: Target, layout: str) -> None:
    # 2.3 MB each: where their rows are whole cache lines they are written past the caches.
    shape = AttentionShape(16, 4, 70, 256, 70, 4, causal=True)
    inputs = attention_inputs(shape, torch.bfloat16, layout=layout)
    call = our_attention(shape, "cpu")
    with poisoned_memory(), target.active():
        whole = attention_results(call, *inputs)
        for batch in range(0, shape.B, 5):
            part = attention_results(call, *(x[batch : batch + 1] for x in inputs))
            for result, value in part.items():
                assert torch.equal(value[0], whole[result][batch]), result


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_gradient_with_stride_zero(target: Target) -> None:
    shape, dtype = AttentionShape(2, 2, 37, 24, 37, 2), widest(target)
    q, k, v = leaves(*attention_inputs(shape, dtype, device=target.device)[:3])
    with target.active():
        lmkern.attention(q, k, v, backend=target.backend).sum().backward()
    expected = exact_attention(q, k, v, torch.ones_like(q), shape)
    for x, result in ((q, "dq"), (k, "dk"), (v, "dv")):
        assert x.grad is not None
        torch.testing.assert_close(x.grad, expected[result].to(dtype), **tolerance(dtype))


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_out_is_laid_out_as_q(target: Target) -> None:
    shape = AttentionShape(2, 3, 5, 8, 5, 3)
    q, k, v, _ = attention_inputs(shape, device=target.device, layout="transposed")
    with target.active():
        assert lmkern.attention(q, k, v, backend=target.backend).stride() == q.stride()


@pytest.mark.parametrize("needs", range(1, 8))
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_gradients_do_not_depend_on_which_are_wanted(target: Target, needs: int) -> None:
    # One head and three: the CPU kernel shares out the work in different ways.
    for heads in (1, 3):
        shape, dtype = AttentionShape(1, heads, 40, 16, 70, heads, causal=True), widest(target)
        *inputs, dout = attention_inputs(shape, dtype, device=target.device)
        everything = exact_attention(*inputs, dout, shape)
        wanted = [bool(needs >> i & 1) for i in range(3)]
        arguments = [x.clone().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
        with poisoned_memory(), target.active():
            lmkern.attention(*arguments, causal=True, backend=target.backend).backward(dout)
        for x, want, result in zip(arguments, wanted, ("dq", "dk", "dv"), strict=True):
            assert (x.grad is not None) == want
            if want:
                torch.testing.assert_close(x.grad, everything[result].to(dtype), **tolerance(dtype))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_every_share_of_the_work_gives_the_gradients(heads: int, threads: int) -> None:
    shape = AttentionShape(1, heads, 300, 16, 300, heads, causal=True)
    inputs = attention_inputs(shape, torch.float64)
    torch.set_num_threads(threads)
    with poisoned_memory():
        ours = attention_results(our_attention(shape, "cpu"), *inputs)
    for result, value in exact_attention(*inputs, shape).items():
        torch.testing.assert_close(ours[result], value, **tolerance(torch.float64))


@pytest.mark.parametrize("scale", [0.0, -0.5, 1.0, 3.0])
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_softmax_scale_is_what_the_scores_are_multiplied_by(target: Target, scale: float) -> None:
    shape, dtype = AttentionShape(1, 2, 30, 16, 30, 2), widest(target)
    q, k, v, _ = attention_inputs(shape, dtype, device=target.device)
    with target.active():
        out = lmkern.attention(q, k, v, softmax_scale=scale, backend=target.backend)
    torch.testing.assert_close(out, (q @ k.mT * scale).softmax(-1) @ v, **tolerance(dtype))


@pytest.mark.parametrize("scale", [0.5, 50.0])
@pytest.mark.parametrize(("target", "dtype"), KERNELS_DTYPES, ids=ids)
def test_a_negative_scale_is_as_good_as_negative_keys(
    target: Target, dtype: torch.dtype, scale: float
) -> None:
    q, k, v, dout = attention_inputs(AttentionShape(1, 2, 64, 16, 200, 2), dtype, device=target.device)
    # Products so small that only the scale makes large scores of them.
    q = q / 4

    def errors(k: Tensor, scale: float, exact: list[Tensor]) -> list[float]:
        inputs = leaves(q, k, v)
        with target.active():
            out = lmkern.attention(*inputs, softmax_scale=scale, backend=target.backend)
            ours = [out, *torch.autograd.grad(out, inputs, dout)]
        return [(a.double() - b).norm().item() / b.norm().item() for a, b in zip(ours, exact, strict=True)]

    wide = leaves(*(x.double() for x in (q, k, v)))
    out = (wide[0] @ wide[1].mT * -scale).softmax(-1) @ wide[2]
    exact = [out.detach(), *torch.autograd.grad(out, wide, dout.double())]
    negative = errors(k, -scale, exact)
    positive = errors(-k, scale, [*exact[:2], -exact[2], exact[3]])
    unit = torch.finfo(dtype).eps
    for mine, other in zip(negative, positive, strict=True):
        assert mine <= 2 * other + unit


@pytest.mark.parametrize(("target", "dtype"), KERNELS_DTYPES, ids=ids)
def test_peaky_rows_are_as_good_as_torchs(target: Target, dtype: torch.dtype) -> None:
    shape = AttentionShape(2, 4, 60, 32, 60, 4, causal=True)

    def draw(seed: int) -> dict[str, Errors]:
        inputs = attention_inputs(shape, dtype, device=target.device, seed=seed, q_factor=64.0)
        with target.active():
            ours = attention_results(our_attention(shape, target.backend), *inputs)
        on_cpu = [x.cpu() for x in inputs]
        torchs = torchs_attention(*on_cpu, shape)
        exact = long_double.attention(*on_cpu, shape)
        return {n: measure(ours[n].cpu(), torchs[n], exact[n]) for n in ours}

    found = verdicts(draw, target.units_beside)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("target", [t for t in TARGETS if t.takes(torch.float64)], ids=str)
@pytest.mark.parametrize(
    "shape",
    [AttentionShape(1, 2, 3, 4, 5, 1, causal=True), AttentionShape(2, 1, 4, 3, 2, 1)],
    ids=str,
)
def test_gradcheck(target: Target, shape: AttentionShape) -> None:
    torch.set_num_threads(1)
    q, k, v = leaves(*attention_inputs(shape, torch.float64)[:3])
    with target.active():
        assert torch.autograd.gradcheck(our_attention(shape, target.backend), (q, k, v))


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_scratch_memory_of_an_earlier_call_is_not_read(target: Target) -> None:
    shape = AttentionShape(1, 2, 37, 24, 50, 2, causal=True)
    inputs = attention_inputs(shape, device=target.device)
    call = our_attention(shape, target.backend)
    larger = AttentionShape(1, 2, 70, 24, 70, 2)
    with target.active():
        before = attention_results(call, *inputs)
        nan = [torch.full_like(x, torch.nan) for x in attention_inputs(larger, device=target.device)]
        attention_results(our_attention(larger, target.backend), *nan)
        after = attention_results(call, *inputs)
    for result, value in before.items():
        assert torch.equal(value, after[result]), result


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_repeats_are_bit_equal(target: Target) -> None:
    shape = AttentionShape(2, 4, 70, 16, 70, 2, causal=True)
    inputs = attention_inputs(shape, device=target.device)
    with target.active():
        results = [attention_results(our_attention(shape, target.backend), *inputs) for _ in range(3)]
    for repeat in results[1:]:
        for result, value in repeat.items():
            assert torch.equal(value, results[0][result]), result


@pytest.mark.parametrize("target", [t for t in TARGETS if t.backend == "cpu"], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2), H_kv=st.integers(1, 3), group=st.integers(1, 2), N_q=st.integers(1, 700),
    N_k=st.integers(1, 700), D=st.integers(1, 40), causal=st.booleans(),
)  # fmt: skip
def test_bits_depend_on_threads_in_the_backward_pass_alone(
    target: Target,
    dtype: torch.dtype,
    B: int,
    H_kv: int,
    group: int,
    N_q: int,
    N_k: int,
    D: int,
    causal: bool,
) -> None:
    shape = AttentionShape(B, H_kv * group, N_q, D, N_k, H_kv, causal)
    inputs, call = attention_inputs(shape, dtype), our_attention(shape, "cpu")
    first: dict[str, Tensor] = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with poisoned_memory(), target.active():
            once, again = (attention_results(call, *inputs) for _ in range(2))
        first = first or once
        for result, value in once.items():
            assert torch.equal(value, again[result]), result
            assert result in ("dq", "dk", "dv") or torch.equal(value, first[result]), result


@pytest.mark.parametrize("target", [t for t in TARGETS if t.backend != "reference"], ids=str)
def test_forward_does_not_depend_on_the_rest_of_the_batch(target: Target) -> None:
    shape = AttentionShape(3, 4, 70, 16, 70, 2, causal=True)
    q, k, v, _ = attention_inputs(shape, device=target.device)
    with target.active():
        whole = lmkern.attention(q, k, v, causal=True, backend=target.backend)
        for batch in range(3):
            alone = lmkern.attention(
                *(x[batch : batch + 1] for x in (q, k, v)), causal=True, backend=target.backend
            )
            assert torch.equal(alone[0], whole[batch])
        pair = lmkern.attention(q[:, 2:], k[:, 1:], v[:, 1:], causal=True, backend=target.backend)
        assert torch.equal(pair, whole[:, 2:])
