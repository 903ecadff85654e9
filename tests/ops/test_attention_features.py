"""Windows, masks, biases, soft cap, sinks and dropout of `lmkern.attention`, alone and in company."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lmkern
from lmkern.ops import alibi, bucketed_bias
from lmkern.testing import (
    ATTENTION_FEATURES,
    AttentionFeatures,
    AttentionShape,
    Target,
    attention_errors,
    attention_inputs,
    attention_options,
    attention_results,
    leaves,
    our_attention,
    over_budget,
    poisoned_memory,
    seeded_randn,
    targets,
)
from lmkern.testing import exact as long_double

TARGETS = targets("attention")
# The reference is the formula in torch's own operations: what it must be is right, not better than torch.
KERNELS = [target for target in TARGETS if target.backend != "reference"]
# Triton's interpreter would take minutes.
FAST = [target for target in TARGETS if not target.interpreted]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EVERYTHING = ATTENTION_FEATURES[-1]

# More keys than queries, and fewer: the first queries then see no key where it is causal.
SHAPES = (AttentionShape(2, 4, 70, 24, 90, 2), AttentionShape(2, 4, 90, 24, 70, 4, causal=True))
SMALL = AttentionShape(1, 2, 4, 3, 5, 1)


def takes(target: Target, dtype: torch.dtype, features: AttentionFeatures) -> bool:
    return target.takes(dtype, options=features.kernel_options(dtype))


def cases(
    among: list[Target], dtypes: tuple[torch.dtype, ...], features: tuple[AttentionFeatures, ...]
) -> list[tuple[Target, torch.dtype, AttentionFeatures]]:
    """On the interpreter a sample: tests/kernels/test_triton_attention.py draws combinations for it."""
    return [
        (t, dtype, f) for t in among for dtype in dtypes for f in t.some(features, 6) if takes(t, dtype, f)
    ]


def taking(features: dict[str, AttentionFeatures], among: list[Target] = FAST) -> list[tuple[Target, str]]:
    """Each target with the names of the features that it takes."""
    return [(t, name) for t in among for name, f in features.items() if takes(t, torch.float32, f)]


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


def run(
    target: Target, shape: AttentionShape, features: AttentionFeatures, dtype: torch.dtype
) -> dict[str, Tensor]:
    inputs = attention_inputs(shape, dtype, device=target.device)
    options = attention_options(shape, features, dtype, device=target.device)
    with poisoned_memory(), target.active():
        return attention_results(our_attention(shape, target.backend), *inputs, options=options)


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
    errors = attention_errors(run(target, shape, features, dtype), shape, features, dtype)
    verdicts = [over_budget(name, error) for name, error in errors.items()]
    assert not any(verdicts), "\n".join(filter(None, verdicts))


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
@pytest.mark.parametrize("target", [t for t in TARGETS if t.backend == "cpu"], ids=str)
def test_bit_equal_from_run_to_run_and_forward_for_any_number_of_threads(
    target: Target, features: AttentionFeatures
) -> None:
    if not takes(target, torch.float32, features):
        features = AttentionFeatures(window=(None, 3))
    shape = AttentionShape(2, 3, 150, 16, 150, 3)
    results = []
    for threads in (2, 2, 1, 3):
        torch.set_num_threads(threads)
        results.append(run(target, shape, features, torch.float32))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
        if name in ("out", "lse"):
            assert all(torch.equal(value, other[name]) for other in results[2:]), name


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
    features, shape, dtype = AttentionFeatures(**{name: "BHqk"}), SHAPES[0], torch.float32
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


@pytest.mark.parametrize("dims", range(5))
def test_bias_and_mask_of_fewer_dimensions(dims: int) -> None:
    q, k, v, _ = attention_inputs(SHAPES[0])
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


@pytest.mark.parametrize("parameter", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_parameters_may_have_another_dtype_and_their_gradient_has_it_too(
    dtype: torch.dtype, parameter: torch.dtype
) -> None:
    q, k, v, _ = attention_inputs(SHAPES[0], dtype)
    options = {
        "bias": torch.randn(4, 70, 90),
        "relative_bias": torch.randn(4, 179),
        "alibi_slopes": torch.rand(4),
        "sinks": torch.randn(4),
    }
    options = dict(zip(options, leaves(*(x.to(parameter) for x in options.values())), strict=True))
    if parameter == torch.float64 and dtype != torch.float64:
        with pytest.raises(ValueError, match=r"bias must be no wider than q; got torch\.float64"):
            lmkern.attention(q, k, v, **options)
        del options["bias"]
    out = lmkern.attention(q, k, v, **options)
    assert out.dtype == dtype
    wide = {name: x.detach().double() for name, x in options.items()}
    exact = lmkern.attention(q.double(), k.double(), v.double(), **wide)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=16 * torch.finfo(dtype).eps)
    out.sum().backward()
    for name, x in options.items():
        assert x.grad is not None
        assert x.grad.dtype == parameter, name


def test_relative_bias_and_sinks_of_any_strides() -> None:
    q, k, v, _ = attention_inputs(SHAPES[0], torch.float32)
    table, sinks = torch.randn(179, 4), torch.randn(4, 3)[:, 1]
    (strided,) = leaves(table.T)
    (packed,) = leaves(table.T.contiguous())
    out = lmkern.attention(q, k, v, relative_bias=strided, sinks=sinks)
    expected = lmkern.attention(q, k, v, relative_bias=packed, sinks=sinks.clone())
    assert torch.equal(out, expected)
    out.sum().backward()
    expected.sum().backward()
    assert torch.equal(strided.grad, packed.grad)


def test_alibi_is_a_slope_times_the_distance() -> None:
    q, k, v, _ = attention_inputs(SHAPES[0], torch.float64)
    slopes = torch.rand(4, dtype=torch.float64)
    offset = torch.arange(90) - torch.arange(70)[:, None] - 20
    expected = (
        q @ k.repeat_interleave(2, 1).mT / math.sqrt(24) - slopes[:, None, None] * offset.abs()
    ).softmax(-1)
    out = lmkern.attention(q, k, v, alibi_slopes=slopes)
    torch.testing.assert_close(out, expected @ v.repeat_interleave(2, 1))
    assert torch.equal(out, lmkern.attention(q, k, v, relative_bias=alibi(slopes, 70, 90)))


def test_alibi_beside_a_relative_bias_of_more_reach_adds_to_it() -> None:
    q, k, v, _ = attention_inputs(SHAPES[0], torch.float64)
    slopes, vector = torch.rand(4, dtype=torch.float64), torch.randn(4, 201, dtype=torch.float64)
    both = lmkern.attention(q, k, v, alibi_slopes=slopes, relative_bias=vector)
    offset = torch.arange(90) - torch.arange(70)[:, None] - 20
    bias = vector[:, offset + 100] - slopes[:, None, None] * offset.abs()
    torch.testing.assert_close(both, lmkern.attention(q, k, v, bias=bias))


def t5_bucket(offset: int, bidirectional: bool, buckets: int, max_distance: int) -> int:
    """The bucket of one key, as Raffel et al. 2020 and their code describe it, in float32."""
    bucket = 0
    if bidirectional:
        buckets //= 2
        bucket = buckets if offset > 0 else 0
        offset = abs(offset)
    else:
        offset = max(-offset, 0)
    exact = buckets // 2
    if offset < exact:
        return bucket + offset
    share = np.log(np.float32(offset) / np.float32(exact)) / np.float32(math.log(max_distance / exact))
    return bucket + min(exact + int(share * np.float32(buckets - exact)), buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (33, 100), (4, 3)])
def test_bucketed_bias_is_t5s(bidirectional: bool, buckets: int, max_distance: int) -> None:
    (table,) = leaves(torch.randn(buckets, 3, dtype=torch.float64))
    vector = bucketed_bias(table, 300, 170, bidirectional=bidirectional, max_distance=max_distance)
    assert vector.shape == (3, 599)
    index = [t5_bucket(offset, bidirectional, buckets, max_distance) for offset in range(-299, 300)]
    assert torch.equal(vector, table[index].T)
    weights = torch.randn(3, 599, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(vector, table, weights)
    expected = torch.zeros_like(table).index_add(0, torch.tensor(index), weights.T)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("buckets", "bidirectional", "max_distance"), [(3, True, 128), (1, False, 128), (32, False, 16)]
)
def test_bucketed_bias_of_impossible_buckets(buckets: int, bidirectional: bool, max_distance: int) -> None:
    with pytest.raises(
        ValueError, match=r"bucketed_bias: expected at least \d buckets and max_distance beyond"
    ):
        bucketed_bias(torch.zeros(buckets, 2), 5, 5, bidirectional=bidirectional, max_distance=max_distance)


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
        [target for target in KERNELS if not target.interpreted],
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
    q, k, v, _ = attention_inputs(SHAPES[0])
    seen = torch.ones(70, 90, dtype=torch.bool)
    seen[:, 60] = False
    options = {name: seen if name == "mask" else torch.zeros(70, 90).masked_fill(~seen, -math.inf)}
    clean = lmkern.attention(q, k, v, **options, backend="reference")
    k[:, :, 60] = torch.nan
    assert torch.equal(lmkern.attention(q, k, v, **options, backend="reference"), clean)


@pytest.mark.parametrize("name", ["bias", "sinks"])
def test_option_changed_before_the_backward_pass_is_an_error(name: str) -> None:
    q, k, v = leaves(*attention_inputs(SHAPES[0])[:3])
    option = torch.zeros(70, 90) if name == "bias" else torch.zeros(4)
    out = lmkern.attention(q, k, v, **{name: option})
    assert isinstance(out, Tensor)
    option += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_window_is_a_band_of_keys() -> None:
    q, k, v, _ = attention_inputs(SHAPES[0], torch.float64)
    offset = torch.arange(90) - torch.arange(70)[:, None] - 20
    for (left, right), causal in (((4, 2), False), ((0, 0), False), ((None, 3), False), ((5, 9), True)):
        seen = (offset <= (0 if causal else right)) & (offset >= -(90 if left is None else left))
        out = lmkern.attention(q, k, v, window=(left, right), causal=causal)
        torch.testing.assert_close(out, lmkern.attention(q, k, v, mask=seen))


def test_backend_says_what_it_does_not_take() -> None:
    q, k, v, _ = attention_inputs(SHAPES[0], torch.float64)
    for target in (target for target in TARGETS if target.interpreted):
        with pytest.raises(
            lmkern.UnsupportedBackend, match="'triton' takes float32, float16 and bfloat16, not float64"
        ):
            lmkern.attention(q, k, v, backend=target.backend)


WRONG = [
    (
        {"window": (-1, 0)},
        r"window must be \(left, right\), each at least 0 or None for no bound; got \(-1, 0\)",
    ),
    ({"softcap": -1.0}, r"softcap must be above 0, or None; got -1.0"),
    ({"softcap": math.nan}, r"softcap must be above 0, or None; got nan"),
    ({"dropout_p": 1.5}, r"dropout_p must lie in \[0, 1\]; got 1.5"),
    (
        {"dropout_p": 0.5, "dropout_seed": torch.tensor(1.0)},
        r"dropout_seed must be an int64 tensor without dim",
    ),
    (
        {"dropout_p": 0.5, "dropout_seed": torch.tensor([1])},
        r"dropout_seed must be .* without dimensions; got torch.int64 \(1,\)",
    ),
    ({"bias": torch.zeros(3, 70, 90)}, r"bias must broadcast to \(2, 4, 70, 90\); got \(3, 70, 90\)"),
    ({"bias": torch.zeros(1, 2, 4, 70, 90)}, r"bias must broadcast to \(2, 4, 70, 90\); got"),
    ({"bias": torch.zeros(70, 90, dtype=torch.int32)}, r"bias must be floating; got torch.int32"),
    ({"bias": torch.zeros(70, 90, device="meta")}, r"bias must be on q's device, cpu; move it with .to\(\)"),
    (
        {"mask": torch.ones(70, 91, dtype=torch.bool)},
        r"mask must broadcast to \(2, 4, 70, 90\); got \(70, 91\)",
    ),
    ({"mask": torch.ones(70, 90)}, r"mask must be boolean \(True: seen\); got torch.float32"),
    (
        {"relative_bias": torch.zeros(4, 177)},
        r"relative_bias must be \(4 or 1, 2 R \+ 1\) with R at least 89",
    ),
    ({"relative_bias": torch.zeros(4, 180)}, r"relative_bias must be .*; got \(4, 180\)"),
    ({"relative_bias": torch.zeros(2, 179)}, r"relative_bias must be .*; got \(2, 179\)"),
    ({"relative_bias": torch.zeros(179)}, r"relative_bias must be .*; got \(179,\)"),
    ({"alibi_slopes": torch.zeros(2)}, r"alibi_slopes must be \(4,\), one a query head; got \(2,\)"),
    ({"sinks": torch.zeros(4, 1)}, r"sinks must be \(4,\), one a query head; got \(4, 1\)"),
    ({"sinks": torch.zeros(4, dtype=torch.int64)}, r"sinks must be floating; got torch.int64"),
    ({"sinks": torch.zeros(4, device="meta")}, r"sinks must be on q's device, cpu"),
]


@pytest.mark.parametrize(
    ("options", "message"), WRONG, ids=lambda x: "-".join(x) if isinstance(x, dict) else ""
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    q, k, v, _ = attention_inputs(SHAPES[0])
    with pytest.raises(ValueError, match=f"^attention: {message}"):
        lmkern.attention(q, k, v, **options)


def test_alibi_slopes_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"alibi: slopes must be \(H,\); got \(2, 2\)"):
        alibi(torch.zeros(2, 2), 3, 3)
    with pytest.raises(ValueError, match=r"bucketed_bias: table must be \(buckets, H\); got \(4,\)"):
        bucketed_bias(torch.zeros(4), 3, 3, bidirectional=True)


def test_relative_bias_of_nothing() -> None:
    randn = seeded_randn(0, torch.float32)
    out = lmkern.attention(
        randn(1, 2, 0, 4), randn(1, 2, 0, 4), randn(1, 2, 0, 4), alibi_slopes=torch.ones(2)
    )
    assert out.shape == (1, 2, 0, 4)
    assert alibi(torch.ones(2), 0, 0).shape == (2, 1)
