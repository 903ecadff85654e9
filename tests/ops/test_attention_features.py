"""Every feature of `lmkern.attention`, alone and in company: values, gradients, bits."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmkern.testing import (
    ATTENTION_FEATURES,
    GEOMETRIC_MEAN,
    AttentionFeatures,
    AttentionShape,
    Errors,
    Target,
    attention_errors,
    attention_inputs,
    attention_options,
    attention_results,
    attention_results_and_alone,
    leaves,
    mean_verdicts,
    our_attention,
    poisoned_memory,
    targets,
    verdicts,
)
from lmkern.testing import exact as long_double

TARGETS = targets("attention")
# The reference is the formula in torch's own operations: what it must be is right, not better than torch.
KERNELS = [target for target in TARGETS if target.backend != "reference"]
# Triton's interpreter would take minutes.
FAST = [target for target in TARGETS if not target.slow]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EVERYTHING = ATTENTION_FEATURES[-1]

# More keys than queries, and fewer: the first queries then see no key where it is causal.
SHAPES = (AttentionShape(2, 4, 70, 24, 90, 2), AttentionShape(2, 4, 90, 24, 70, 4, causal=True))
SMALL = AttentionShape(1, 2, 4, 3, 5, 1)
# The CPU takes few queries of many keys to the keys as they lie, where what is asked for allows it.
FEW = AttentionShape(6, 4, 5, 40, 200, 2, causal=True)
FEATURES_OF_FEW = (
    AttentionFeatures(window=(20, 0)),
    AttentionFeatures(softcap=1.5, sinks=True),
    AttentionFeatures(alibi=True),
    AttentionFeatures(mask="Bk"),
    AttentionFeatures(dropout_p=0.25),
)


def takes(target: Target, dtype: torch.dtype, features: AttentionFeatures) -> bool:
    return target.takes(dtype, options=features.kernel_options(dtype))


def cases(
    among: list[Target], dtypes: tuple[torch.dtype, ...], features: tuple[AttentionFeatures, ...]
) -> list[tuple[Target, torch.dtype, AttentionFeatures]]:
    """On the interpreter a sample: tests/kernels/test_triton_attention.py draws combinations for it."""
    return [
        (t, dtype, f) for t in among for dtype in dtypes for f in t.some(features, 6) if takes(t, dtype, f)
    ]


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


def run(
    target: Target, shape: AttentionShape, features: AttentionFeatures, dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    inputs = attention_inputs(shape, dtype, device=target.device, seed=seed)
    options = attention_options(shape, features, dtype, device=target.device, seed=seed)
    with poisoned_memory(), target.active():
        return attention_results_and_alone(shape, target.backend, *inputs, options)


@functools.cache
def errors(
    target: Target, shape: AttentionShape, features: AttentionFeatures, dtype: torch.dtype, seed: int = 0
) -> dict[str, Errors]:
    shape = target.lighter(shape)
    return attention_errors(run(target, shape, features, dtype, seed), shape, features, dtype, seed)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("target", "dtype", "features"),
    [
        *cases(KERNELS, (torch.float32, torch.bfloat16), ATTENTION_FEATURES),
        *cases(KERNELS, (torch.float16, torch.float64), (EVERYTHING,)),
    ],
    ids=ids,
)
def test_errors_are_at_most_twice_torchs(
    target: Target, dtype: torch.dtype, features: AttentionFeatures, shape: AttentionShape
) -> None:
    found = verdicts(functools.partial(errors, target, shape, features, dtype), target.units_beside)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("N_q", [1, 5])
@pytest.mark.parametrize(
    ("target", "dtype", "features"),
    cases([t for t in FAST if t.backend == "cpu"], DTYPES, FEATURES_OF_FEW),
    ids=ids,
)
def test_errors_of_few_queries_are_at_most_twice_torchs(
    target: Target, dtype: torch.dtype, features: AttentionFeatures, N_q: int
) -> None:
    shape = dataclasses.replace(FEW, N_q=N_q)

    def of_results(seed: int) -> dict[str, Errors]:
        found = errors(target, shape, features, dtype, seed)
        return {name: found[name] for name in ("out", "lse")}

    found = verdicts(of_results, target.units_beside)
    assert not found, "\n".join(found)


# A sample of the features, which is what the interpreter is given, is no mean.
@pytest.mark.parametrize(
    ("target", "dtype"),
    [(t, d) for t in KERNELS if not t.slow for d in (torch.float32, torch.bfloat16) if t.takes(d)],
    ids=ids,
)
def test_errors_over_all_features_are_about_torchs(target: Target, dtype: torch.dtype) -> None:
    draws = [
        functools.partial(errors, target, shape, features, dtype)
        for _, _, features in cases([target], (dtype,), ATTENTION_FEATURES)
        for shape in SHAPES
    ]
    assert not (found := mean_verdicts(draws, target.units_beside, GEOMETRIC_MEAN)), "\n".join(found)


def feature_values(draw: st.DrawFn) -> dict[str, Any]:
    bound = st.none() | st.integers(0, 30)
    broadcast = st.sets(st.sampled_from("BHqk")).map("".join)
    return {
        "window": draw(st.none() | st.tuples(bound, bound)),
        "softcap": draw(st.none() | st.floats(0.5, 20)),
        "bias": draw(st.none() | broadcast),
        "mask": draw(st.none() | broadcast),
        "relative_bias": draw(st.sampled_from([None, "1", "H"])),
        "alibi": draw(st.booleans()),
        "sinks": draw(st.booleans()),
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.1, 0.9])),
    }


@st.composite
def calls(draw: st.DrawFn) -> tuple[AttentionShape, dict[str, Any]]:
    heads_kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    n_q, n_k = (draw(st.integers(0, 70)) for _ in range(2))
    batch, head_dim = draw(st.integers(0, 2)), draw(st.integers(1, 40))
    causal = draw(st.booleans())
    shape = AttentionShape(batch, heads_kv * group, n_q, head_dim, n_k, heads_kv, causal)
    return shape, feature_values(draw)


@pytest.mark.parametrize("target", [t for t in FAST if t.takes(torch.float64)], ids=str)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(call=calls())
def test_any_combination_agrees_with_the_formula_in_long_double(
    target: Target, call: tuple[AttentionShape, dict[str, Any]]
) -> None:
    shape, values = call
    taken = {n: x for n, x in values.items() if takes(target, torch.float64, AttentionFeatures(**{n: x}))}
    features = AttentionFeatures(**taken)
    inputs = attention_inputs(shape, torch.float64, device=target.device)
    options = attention_options(shape, features, torch.float64, device=target.device)
    dlse = torch.randn(shape.B, shape.H, shape.N_q, dtype=torch.float64, device=target.device)
    with poisoned_memory(), target.active():
        ours = attention_results(our_attention(shape, target.backend), *inputs, dlse, options)
    exact = long_double.attention(*inputs, shape, dlse, options)
    assert set(ours) == set(exact)
    for result, value in ours.items():
        expected = torch.from_numpy(exact[result].astype("float64"))
        torch.testing.assert_close(value.cpu(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("target", "dtype", "features"), cases(FAST, (torch.float64,), ATTENTION_FEATURES), ids=ids
)
def test_gradcheck(target: Target, dtype: torch.dtype, features: AttentionFeatures) -> None:
    torch.set_num_threads(1)
    options = attention_options(SMALL, features, dtype, device=target.device)
    names = [n for n, x in options.items() if isinstance(x, Tensor) and x.is_floating_point()]
    tensors = leaves(*attention_inputs(SMALL, dtype, device=target.device)[:3], *(options[n] for n in names))

    def call(q: Tensor, k: Tensor, v: Tensor, *further: Tensor) -> tuple[Tensor, Tensor]:
        given = {**options, **dict(zip(names, further, strict=True))}
        out, lse = our_attention(SMALL, target.backend)(q, k, v, **given)
        return out, lse.nan_to_num(neginf=0.0)

    with target.active():
        assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize(
    ("target", "dtype", "features"), cases(FAST, (torch.float32,), ATTENTION_FEATURES), ids=ids
)
def test_gradients_do_not_depend_on_which_are_wanted(
    target: Target, dtype: torch.dtype, features: AttentionFeatures
) -> None:
    shape = AttentionShape(1, 2, 40, 16, 70, 1)
    inputs = attention_inputs(shape, dtype, device=target.device)
    options = attention_options(shape, features, dtype, device=target.device)
    call = our_attention(shape, target.backend)
    floating = [n for n, x in options.items() if isinstance(x, Tensor) and x.is_floating_point()]
    with poisoned_memory(), target.active():
        everything = attention_results(call, *inputs, options=options)
        for name in ("q", *floating):
            (leaf,) = leaves(inputs[0] if name == "q" else options[name])
            q = leaf if name == "q" else inputs[0]
            given = options if name == "q" else {**options, name: leaf}
            (gradient,) = torch.autograd.grad(call(q, *inputs[1:3], **given)[0], leaf, inputs[3])
            assert torch.equal(gradient, everything[f"d{name}"]), name


@pytest.mark.parametrize("features", [EVERYTHING, *ATTENTION_FEATURES[:-1:3]], ids=str)
@pytest.mark.parametrize(
    "target", [t for t in TARGETS if t.backend == "cpu" and t.takes(torch.float32)], ids=str
)
def test_bit_equal_from_run_to_run_and_forward_for_any_number_of_threads(
    target: Target, features: AttentionFeatures
) -> None:
    shape = AttentionShape(2, 3, 150, 16, 150, 3)
    results = []
    for threads in (2, 2, 1, 3):
        torch.set_num_threads(threads)
        results.append(run(target, shape, features, torch.float32))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
        if name in ("out", "lse"):
            assert all(torch.equal(value, other[name]) for other in results[2:]), name
