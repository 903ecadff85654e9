"""Masks, additive biases, windows and sinks of `lmkern.attention`: how they lie, and what they hide."""

import math

import pytest
import torch

import lmkern
from lmkern.testing import (
    AttentionFeatures,
    AttentionShape,
    Target,
    attention_inputs,
    attention_options,
    attention_results,
    leaves,
    our_attention,
    poisoned_memory,
    targets,
)

# Triton's interpreter would take minutes.
FAST = [target for target in targets("attention") if not target.slow]
# More keys than queries.
SHAPE = AttentionShape(2, 4, 70, 24, 90, 2)


def taking(features: dict[str, AttentionFeatures], among: list[Target] = FAST) -> list[tuple[Target, str]]:
    """Each target with the names of the features that it takes."""
    return [
        (t, name)
        for t in among
        for name, f in features.items()
        if t.takes(torch.float32, options=f.kernel_options())
    ]


MEMORY = {
    "contiguous": lambda x: x,
    "columns": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 4))[..., 1:-4, 3:-2],
    "every_second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:, :1].expand_as(x),
    "expanded_queries": lambda x: x[:, :, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", MEMORY)
@pytest.mark.parametrize(
    ("target", "name"),
    taking({"bias": AttentionFeatures(bias="BHqk"), "mask": AttentionFeatures(mask="BHqk")}),
    ids=str,
)
def test_bias_and_mask_may_lie_in_memory_in_any_way(target: Target, name: str, layout: str) -> None:
    features, shape, dtype = AttentionFeatures(**{name: "BHqk"}), SHAPE, torch.float32
    inputs = attention_inputs(shape, dtype, device=target.device)
    x = MEMORY[layout](attention_options(shape, features, dtype, device=target.device)[name])
    call = our_attention(shape, target.backend)
    with poisoned_memory(), target.active():
        strided = attention_results(call, *inputs, options={name: x})
        dense = attention_results(
            call, *inputs, options={name: x.clone(memory_format=torch.contiguous_format)}
        )
    for result, value in strided.items():
        torch.testing.assert_close(value, dense[result], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "dtype"),
    [(t, d) for t in FAST if t.backend != "reference" for d in (torch.float32, torch.bfloat16) if t.takes(d)],
    ids=str,
)
def test_bias_of_the_least_number_hides_as_a_mask_does(target: Target, dtype: torch.dtype) -> None:
    # As transformers writes its masks.
    inputs = attention_inputs(SHAPE, dtype, device=target.device)
    inputs[3][:, :, 7] = 0
    mask = attention_options(SHAPE, AttentionFeatures(mask="BHqk"), dtype, device=target.device)["mask"]
    mask[..., 0] = True
    blind = torch.full_like(mask, False)
    blind[:, :, 7] = True
    bias = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask | blind, torch.finfo(dtype).min)
    call = our_attention(SHAPE, target.backend)
    with poisoned_memory(), target.active():
        least = attention_results(call, *inputs, options={"bias": bias})
        hidden = attention_results(call, *inputs, options={"mask": mask})
    # A query whose keys all have it sees them all alike.
    v = inputs[2].repeat_interleave(SHAPE.H // SHAPE.H_kv, 1)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(least["out"][:, :, 7], v.mean(2), rtol=tolerance, atol=tolerance)
    least["out"][:, :, 7] = hidden["out"][:, :, 7]
    # Nor does a gradient of 0 become one that is not.
    for name in ("out", "dq", "dk", "dv"):
        torch.testing.assert_close(least[name], hidden[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dims", range(5))
def test_bias_and_mask_of_fewer_dimensions(dims: int) -> None:
    q, k, v, _ = attention_inputs(SHAPE)
    size = (2, 4, 70, 90)[4 - dims :]
    (bias,) = leaves(torch.randn(size))
    for name, x, full in (
        ("bias", bias, bias.expand(2, 4, 70, 90)),
        ("mask", bias > 0, (bias > 0).expand(2, 4, 70, 90)),
    ):
        out = lmkern.attention(q, k, v, **{name: x})
        torch.testing.assert_close(out, lmkern.attention(q, k, v, **{name: full}))
    lmkern.attention(q, k, v, bias=bias).sum().backward()
    assert bias.grad is not None
    assert bias.grad.shape == size


def test_window_is_a_band_of_keys() -> None:
    q, k, v, _ = attention_inputs(SHAPE, torch.float64)
    offset = torch.arange(90) - torch.arange(70)[:, None] - 20
    for (left, right), causal in (((4, 2), False), ((0, 0), False), ((None, 3), False), ((5, 9), True)):
        seen = (offset <= (0 if causal else right)) & (offset >= -(90 if left is None else left))
        out = lmkern.attention(q, k, v, window=(left, right), causal=causal)
        torch.testing.assert_close(out, lmkern.attention(q, k, v, mask=seen))


@pytest.mark.parametrize("target", [t for t in FAST if t.backend == "cpu"], ids=str)
def test_keys_that_no_query_sees_have_gradient_zero(target: Target) -> None:
    shape = AttentionShape(1, 2, 150, 32, 1100, 1)
    q, k, v, dout = attention_inputs(shape, torch.bfloat16)
    q, k, v = leaves(q, k, v)
    with poisoned_memory(), target.active():
        # Scratch memory that the next call finds.
        lmkern.attention(q, k, v, backend="cpu").backward(dout)
        for left in (20, 300):
            out = lmkern.attention(q, k, v, window=(left, 0), backend="cpu")
            for gradient in torch.autograd.grad(out, (k, v), dout):
                seen = (gradient != 0).any(-1)[0, 0]
                assert seen.equal(torch.arange(1100) >= 950 - left)


HIDING = {
    f"{name}{'-sinks' * sinks}": AttentionFeatures(**{name: "q"}, sinks=sinks)
    for name in ("mask", "bias")
    for sinks in (False, True)
}


@pytest.mark.parametrize(("target", "name"), taking(HIDING), ids=str)
def test_row_that_sees_nothing_is_zero_and_its_lse_is_the_sink(target: Target, name: str) -> None:
    name, *sinks = name.split("-")
    shape = AttentionShape(1, 2, 40, 8, 30, 2)
    *inputs, dout = attention_inputs(shape, device=target.device)
    seen = torch.ones(1, 1, 40, 30, dtype=torch.bool)
    seen[:, :, 7] = False
    options = {name: seen if name == "mask" else torch.zeros(seen.shape).masked_fill(~seen, -math.inf)}
    if sinks:
        options["sinks"] = torch.randn(2)
    options = {n: x.to(target.device) for n, x in options.items()}
    dlse = torch.randn(1, 2, 40).to(target.device)
    with poisoned_memory(), target.active():
        results = attention_results(our_attention(shape, target.backend), *inputs, dout, dlse, options)
    assert (results["out"][:, :, 7] == 0).all()
    expected = options["sinks"] if sinks else torch.full((2,), -math.inf)
    assert torch.equal(results["lse"][0, :, 7].cpu(), expected.cpu())
    assert (results["dq"][:, :, 7] == 0).all()
    assert all(results[n].isfinite().all() for n in results if n != "lse")
    if name == "bias":
        assert (results["dbias"][:, :, 7] == 0).all()


@pytest.mark.parametrize(("target", "name"), taking({"sinks": AttentionFeatures(sinks=True)}), ids=str)
def test_sink_of_minus_infinity_is_none(target: Target, name: str) -> None:
    shape = AttentionShape(1, 2, 40, 8, 30, 2, causal=True)
    inputs = attention_inputs(shape, device=target.device)
    call = our_attention(shape, target.backend)
    with target.active():
        results = attention_results(
            call, *inputs, options={name: torch.full((2,), -math.inf, device=target.device)}
        )
        without = attention_results(call, *inputs)
    assert (results.pop("dsinks") == 0).all()
    for name, value in without.items():
        torch.testing.assert_close(results[name], value)


@pytest.mark.parametrize(
    ("target", "name"),
    taking(
        {
            "mask": AttentionFeatures(mask="qk"),
            "bias": AttentionFeatures(bias="qk"),
            "window": AttentionFeatures(window=(10, 0)),
        },
        [target for target in FAST if target.backend != "reference"],
    ),
    ids=str,
)
def test_nan_in_a_key_reaches_exactly_the_queries_that_see_it(target: Target, name: str) -> None:
    shape = AttentionShape(1, 2, 150, 16, 150, 2)
    seen = torch.ones(150, 150, dtype=torch.bool, device=target.device)
    seen[:, 60] = False
    hidden = torch.zeros(150, 150, device=target.device).masked_fill(~seen, -math.inf)
    options = {name: {"mask": seen, "bias": hidden, "window": (10, 0)}[name]}
    reached = range(60, 71) if name == "window" else range(0)
    inputs = attention_inputs(shape, device=target.device)
    with poisoned_memory(), target.active():
        clean = attention_results(our_attention(shape, target.backend), *inputs, options=options)
        inputs[1][0, 1, 60, 3] = torch.nan
        ill = attention_results(our_attention(shape, target.backend), *inputs, options=options)
    for result in ("out", "lse", "dq"):
        for query in range(150):
            after, before = ill[result][0, 1, query], clean[result][0, 1, query]
            assert after.isnan().all() if query in reached else torch.equal(after, before), (result, query)


@pytest.mark.parametrize("name", ["mask", "bias"])
def test_nan_in_a_key_that_nobody_sees_reaches_nothing_in_the_reference(name: str) -> None:
    q, k, v, _ = attention_inputs(SHAPE)
    seen = torch.ones(70, 90, dtype=torch.bool)
    seen[:, 60] = False
    options = {name: seen if name == "mask" else torch.zeros(70, 90).masked_fill(~seen, -math.inf)}
    clean = lmkern.attention(q, k, v, **options, backend="reference")
    k[:, :, 60] = torch.nan
    assert torch.equal(lmkern.attention(q, k, v, **options, backend="reference"), clean)
