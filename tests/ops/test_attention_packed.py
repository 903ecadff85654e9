"""Packed documents in `lmkern.attention`: each is what it would be alone."""

import functools
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lmkern
from lmkern.testing import (
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
    mean_verdicts,
    our_attention,
    poisoned_memory,
    targets,
    verdicts,
)
from lmkern.testing import exact as long_double

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (N_q, N_k): shorter than a block, a block, longer; of one length and of two; empty on either side and both.
DOCUMENTS = ((5, 5), (0, 0), (64, 64), (33, 90), (1, 30), (0, 4), (100, 100), (7, 0), (90, 40), (0, 0))
# The same kinds in fewer tiles of 64, for slow targets.
SHORT = ((5, 5), (0, 0), (64, 64), (1, 70), (0, 4), (7, 0), (70, 33), (0, 0))


def takes(target: Target, features: AttentionFeatures, dtype: torch.dtype = torch.float32) -> bool:
    return target.takes(dtype, options=features.kernel_options(dtype))


TARGETS = [
    t for t in targets("attention") if takes(t, AttentionFeatures(documents=DOCUMENTS), torch.bfloat16)
]
IN_FLOAT32 = [target for target in TARGETS if target.takes(torch.float32)]
KERNELS = [target for target in TARGETS if target.backend != "reference"]
FAST = [target for target in TARGETS if not target.slow]

FEATURES = (
    AttentionFeatures(documents=DOCUMENTS),
    AttentionFeatures(documents=DOCUMENTS, window=(20, 5)),
    AttentionFeatures(documents=DOCUMENTS, dropout_p=0.25),
    AttentionFeatures(documents=DOCUMENTS, relative_bias="H", sinks=True, softcap=2.0),
    AttentionFeatures(documents=DOCUMENTS, alibi=True, window=(40, 0), dropout_p=0.1, sinks=True),
)


def shape_of(
    documents: tuple[tuple[int, int], ...], *, causal: bool, H: int = 4, H_kv: int = 2, D: int = 24
) -> AttentionShape:
    n_q, n_k = (sum(document[side] for document in documents) for side in (0, 1))
    return AttentionShape(1, H, n_q, D, n_k, H_kv, causal)


def alone(
    target: Target, inputs: tuple[Tensor, ...], dlse: Tensor, shape: AttentionShape, options: dict[str, Any]
) -> dict[str, Tensor]:
    """The results of each document on its own, one after the other; the gradients of parameters added up."""
    options = dict(options)
    ends = zip(options.pop("cu_seqlens").tolist(), options.pop("cu_seqlens_k").tolist(), strict=True)
    results: dict[str, list[Tensor]] = {}
    for (a, c), (b, d) in pairwise(ends):
        q, k, v, dout = (
            x[:, :, start:end] for x, start, end in zip(inputs, (a, c, c, a), (b, d, d, b), strict=True)
        )
        call = our_attention(shape, target.backend)
        for name, value in attention_results(call, q, k, v, dout, dlse[:, :, a:b], options).items():
            results.setdefault(name, []).append(value)
    tokens = ("out", "lse", "dq", "dk", "dv")
    return {n: torch.cat(x, 2) if n in tokens else torch.stack(x).sum(0) for n, x in results.items()}


@functools.cache
def errors(
    target: Target, features: AttentionFeatures, dtype: torch.dtype, causal: bool, seed: int = 0
) -> dict[str, Errors]:
    shape = target.lighter(shape_of(features.documents, causal=causal))
    inputs = attention_inputs(shape, dtype, device=target.device, seed=seed)
    options = attention_options(shape, features, dtype, device=target.device, seed=seed)
    with poisoned_memory(), target.active():
        ours = attention_results_and_alone(shape, target.backend, *inputs, options)
    return attention_errors(ours, shape, features, dtype, seed)


# Dropout apart: alone, a document is sequence 0 and has another mask.
WITHOUT_DROPOUT = [features for features in FEATURES if not features.dropout_p]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("target", "features", "dtype"),
    [
        (t, f, dtype)
        for t in KERNELS
        for f in t.some(FEATURES, 4)
        for dtype in t.some(DTYPES if f in (FEATURES[0], FEATURES[-1]) else DTYPES[:2], 2)
        if takes(t, f, dtype)
    ],
    ids=str,
)
def test_errors_are_at_most_twice_torchs(
    target: Target, features: AttentionFeatures, dtype: torch.dtype, causal: bool
) -> None:
    features = replace(features, documents=SHORT) if target.slow else features
    found = verdicts(functools.partial(errors, target, features, dtype, causal), target.units_beside)
    assert not found, "\n".join(found)


# A sample of the features, which is what the interpreter is given, is no mean.
@pytest.mark.parametrize(
    ("target", "dtype"),
    [(t, dtype) for t in KERNELS if not t.slow for dtype in DTYPES[:2] if t.takes(dtype)],
    ids=str,
)
def test_errors_over_all_features_are_about_torchs(target: Target, dtype: torch.dtype) -> None:
    draws = [
        functools.partial(errors, target, features, dtype, causal)
        for features in FEATURES
        for causal in (False, True)
    ]
    assert not (found := mean_verdicts(draws, target.units_beside, GEOMETRIC_MEAN)), "\n".join(found)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("target", "features", "dtype"),
    [(t, f, d) for t in FAST for f in WITHOUT_DROPOUT for d in DTYPES[:2] if takes(t, f, d)],
    ids=str,
)
def test_document_is_what_it_is_alone(
    target: Target, features: AttentionFeatures, dtype: torch.dtype, causal: bool
) -> None:
    shape = shape_of(DOCUMENTS, causal=causal)
    inputs = attention_inputs(shape, dtype, device=target.device)
    options = attention_options(shape, features, dtype, device=target.device)
    dlse = torch.randn(1, 4, shape.N_q).to(target.device)
    # bfloat16 rounds what differs by the order of sums up or down.
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    with poisoned_memory(), target.active():
        together = attention_results(our_attention(shape, target.backend), *inputs, dlse, options)
        apart = alone(target, inputs, dlse, shape, options)
    for name, value in together.items():
        if target.backend == "cpu" and name in ("out", "lse", "dq", "dk", "dv"):
            assert torch.equal(value, apart[name]), name
        else:
            torch.testing.assert_close(value, apart[name], **tolerance)


@st.composite
def packed(draw: st.DrawFn) -> tuple[AttentionShape, AttentionFeatures]:
    length = st.integers(0, 40)
    documents = tuple(draw(st.lists(st.tuples(length, length), max_size=5)))
    heads_kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    shape = shape_of(
        documents, causal=draw(st.booleans()), H=heads_kv * group, H_kv=heads_kv, D=draw(st.integers(1, 20))
    )
    bound = st.none() | st.integers(0, 20)
    return shape, AttentionFeatures(
        documents=documents or ((0, 0),),
        window=draw(st.none() | st.tuples(bound, bound)),
        relative_bias=draw(st.sampled_from([None, "1", "H"])),
        sinks=draw(st.booleans()),
        dropout_p=draw(st.sampled_from([0.0, 0.3])),
    )


@pytest.mark.parametrize("target", [t for t in FAST if t.takes(torch.float64)], ids=str)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(call=packed())
def test_any_packing_agrees_with_the_formula_in_long_double(
    target: Target, call: tuple[AttentionShape, AttentionFeatures]
) -> None:
    shape, features = call
    inputs = attention_inputs(shape, torch.float64, device=target.device)
    options = attention_options(shape, features, torch.float64, device=target.device)
    dlse = torch.randn(1, shape.H, shape.N_q, dtype=torch.float64, device=target.device)
    with poisoned_memory(), target.active():
        ours = attention_results(our_attention(shape, target.backend), *inputs, dlse, options)
    for name, value in long_double.attention(*inputs, shape, dlse, options).items():
        expected = torch.from_numpy(value.astype("float64"))
        torch.testing.assert_close(ours[name].cpu(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_document_sees_nothing_of_the_others(target: Target) -> None:
    documents = ((30, 30), (70, 70), (20, 20))
    shape = shape_of(documents, causal=False, H=2)
    inputs = attention_inputs(shape, device=target.device)
    options = attention_options(shape, AttentionFeatures(documents=documents), device=target.device)
    call = our_attention(shape, target.backend)
    with poisoned_memory(), target.active():
        clean = attention_results(call, *inputs, options=options)
        for x in inputs:
            x[:, :, 30:100] = torch.nan
        ill = attention_results(call, *inputs, options=options)
    for name, value in clean.items():
        for tokens in (slice(30), slice(100, None)):
            assert torch.equal(ill[name][:, :, tokens], value[:, :, tokens]), name


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_no_documents(target: Target) -> None:
    q = torch.randn(1, 2, 0, 8, device=target.device)
    ends = torch.zeros(1, dtype=torch.int32, device=target.device)
    with target.active():
        assert lmkern.attention(q, q, q, cu_seqlens=ends, backend=target.backend).shape == q.shape


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_lengths_in_either_integer_and_any_stride(dtype: torch.dtype) -> None:
    q, k, v, _ = attention_inputs(shape_of(((30, 30), (70, 70)), causal=True))
    ends = torch.tensor([0, 30, 100], dtype=dtype)
    expected = torch.cat(
        [lmkern.attention(*(x[:, :, a:b] for x in (q, k, v)), causal=True) for a, b in ((0, 30), (30, 100))],
        2,
    )
    spread = ends.repeat_interleave(2)[::2]
    for cu_seqlens in (ends, spread):
        out = lmkern.attention(q, k, v, causal=True, cu_seqlens=cu_seqlens)
        torch.testing.assert_close(out, expected)


def ends_of(*lengths: int) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"cu_seqlens": ends_of(30, 69)},
        r"cu_seqlens must begin at 0, never fall and end at 100; got \[0, 30, 99\]",
    ),
    ({"cu_seqlens": ends_of(30, 80, -10)}, r"cu_seqlens must begin .*; got \[0, 30, 110, 100\]"),
    ({"cu_seqlens": ends_of(30, 70).long() + 2**32}, r"cu_seqlens must begin .*"),
    ({"cu_seqlens": ends_of(30, 70) + 1}, r"cu_seqlens must begin .*; got \[1, 31, 101\]"),
    ({"cu_seqlens": ends_of(100), "cu_seqlens_k": ends_of(90)}, r"cu_seqlens_k must begin .*; got \[0, 90\]"),
    ({"cu_seqlens": ends_of(*[10] * 11)}, r"got \[0, 10, 20, 30, 40, 50, 60, 70, \.\.\.\]"),
    ({"cu_seqlens": ends_of(100), "cu_seqlens_k": ends_of(90, 10)}, r"as many documents; got 1 and 2"),
    ({"cu_seqlens_k": ends_of(100)}, r"cu_seqlens_k needs cu_seqlens"),
    (
        {"cu_seqlens": ends_of(100).float()},
        r"cu_seqlens must be \(documents \+ 1,\) int32 or int64; got \(2,\)",
    ),
    ({"cu_seqlens": ends_of(100)[None]}, r"cu_seqlens must be \(documents \+ 1,\) .*; got \(1, 2\)"),
    ({"cu_seqlens": ends_of(100)[:0]}, r"cu_seqlens must be \(documents \+ 1,\) .*; got \(0,\)"),
    ({"cu_seqlens": ends_of(100).to("meta")}, r"cu_seqlens must be on q's device, cpu"),
    ({"cu_seqlens": ends_of(100), "bias": torch.zeros(())}, r"bias and mask do not go with cu_seqlens"),
    ({"cu_seqlens": ends_of(100), "mask": torch.ones((), dtype=torch.bool)}, r"bias and mask do not go with"),
    (
        {"cu_seqlens": ends_of(100), "relative_bias": torch.zeros(4, 197)},
        r"relative_bias must be .* at least 99",
    ),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_lengths_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    q, k, v, _ = attention_inputs(shape_of(((100, 100),), causal=False))
    with pytest.raises(ValueError, match=f"attention: .*{message}"):
        lmkern.attention(q, k, v, **options)


def test_lengths_that_make_no_sense_are_refused_where_compiled_too() -> None:
    torch.compiler.reset()
    q, k, v, _ = attention_inputs(shape_of(((100, 100),), causal=False))
    compiled = torch.compile(lmkern.attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="attention: cu_seqlens must begin at 0, never fall and end at 100"):
        compiled(q, k, v, cu_seqlens=ends_of(30, 69))


def test_packed_batch_of_two() -> None:
    q, k, v, _ = attention_inputs(AttentionShape(2, 2, 10, 8, 10, 2))
    with pytest.raises(ValueError, match="packed documents need a batch of 1, all in a row; got B = 2"):
        lmkern.attention(q, k, v, cu_seqlens=ends_of(10))


def test_keys_of_another_length_need_lengths_of_their_own() -> None:
    q, k, v, _ = attention_inputs(AttentionShape(1, 2, 10, 8, 12, 2))
    with pytest.raises(ValueError, match=r"cu_seqlens_k beside cu_seqlens, expected; got lengths 10 and 12"):
        lmkern.attention(q, k, v, cu_seqlens=ends_of(10))
