"""What is no tensor or number, and what is neither on nor off, is refused by the name of the argument."""

from collections.abc import Callable
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lmkern
from lmkern.models import GPTConfig
from lmkern.nn import (
    Block,
    CrossAttention,
    FeedForward,
    MultiheadAttention,
    SelfAttention,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

OPS = sorted(set(lmkern.ops.__all__) - {"bucketed_bias"})
FLAGS = [
    (name, option.name)
    for name in lmkern.ops.__all__
    for option in signature(getattr(lmkern.ops, name)).parameters.values()
    if option.annotation == "bool"
]


@pytest.mark.parametrize("name", OPS)
def test_each_op_names_what_is_no_tensor(name: str) -> None:
    op = getattr(lmkern.ops, name)
    declared = signature(op).parameters
    first, *others = (p.name for p in declared.values() if p.default is p.empty and p.kind != p.KEYWORD_ONLY)
    with pytest.raises(TypeError, match=rf"^{name}: {first} must be a torch\.Tensor; got list$"):
        op([1.0], *(torch.ones(2, 2) for _ in others))


def test_an_optional_tensor_may_be_none_and_nothing_else() -> None:
    x = torch.randn(3, 4)
    assert lmkern.layer_norm(x, (4,), None).shape == (3, 4)
    with pytest.raises(TypeError, match=r"^layer_norm: bias must be a torch\.Tensor; got tuple$"):
        lmkern.layer_norm(x, (4,), bias=(4,))
    with pytest.raises(TypeError, match=r"^attention: alibi_slopes must be a torch\.Tensor; got float$"):
        lmkern.attention(*(torch.randn(1, 1, 2, 4) for _ in range(3)), alibi_slopes=0.5)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda q, given: lmkern.attention(q, q, q, softmax_scale=given), "attention: softmax_scale"),
        (lambda q, given: lmkern.attention(q, q, q, dropout_p=given), "attention: dropout_p"),
        (lambda q, given: lmkern.layer_norm(q, (4,), eps=given), "layer_norm: eps"),
        (lambda q, given: lmkern.rms_norm(q, (4,), None, given), "rms_norm: eps"),
        (
            lambda q, given: lmkern.cross_entropy(q[0, 0], torch.zeros(3).long(), z_loss=given),
            "cross_entropy: z_loss",
        ),
    ],
)
def test_what_is_no_number_is_named(call: Callable[[Any, Any], object], name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name} must be a number; got str$"):
        call(torch.randn(1, 2, 3, 4), "x")


def test_other_failures_are_as_they_were() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'weights'"):
        lmkern.rms_norm(torch.ones(2, 3), (3,), weights=torch.ones(3))


@pytest.mark.parametrize("window", [5, (1,), "ab", (-1, 0)])
def test_a_window_is_two_bounds(window: object) -> None:
    q, k, v = (torch.randn(1, 1, 2, 4) for _ in range(3))
    with pytest.raises(ValueError, match=r"attention: window must be \(left, right\)"):
        lmkern.attention(q, k, v, window=window)


def test_a_shape_is_of_integers() -> None:
    with pytest.raises(ValueError, match=r"normalized_shape \(integers, not Tensor\)"):
        lmkern.layer_norm(torch.ones(2, 3), torch.ones(3))


def test_the_size_of_one_dimension_is_a_shape() -> None:
    x = torch.randn(2, 3)
    assert torch.equal(lmkern.layer_norm(x, 3), lmkern.layer_norm(x, (3,)))
    assert torch.equal(lmkern.rms_norm(x, 3), lmkern.rms_norm(x, (3,)))


def arguments(name: str) -> dict[str, Any]:
    """Tensors that each op with a flag takes, by the op's own names."""
    q, x = torch.randn(1, 2, 3, 4), torch.randn(3, 4)
    return {
        "attention": {"q": q, "k": q, "v": q},
        "scaled_dot_product_attention": {"query": q, "key": q, "value": q},
        "cached_attention": {"q": q, "k_cache": q, "v_cache": q},
        "activation": {"x": x},
        "rotary": {"x": q, "cos": torch.ones(3, 2), "sin": torch.zeros(3, 2)},
        "bucketed_bias": {"table": torch.randn(8, 2), "n_q": 3, "n_k": 3, "bidirectional": True},
    }[name]


@pytest.mark.parametrize(("name", "option"), FLAGS)
@pytest.mark.parametrize("given", ["no", 0, 1, None, torch.tensor(True)], ids=repr)
def test_an_option_is_on_or_off_and_nothing_else(name: str, option: str, given: object) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: {option} must be True or False; got"):
        getattr(lmkern, name)(**{**arguments(name), option: given})


@pytest.mark.parametrize(("name", "option"), FLAGS)
def test_numpys_truth_values_are_truth_values(name: str, option: str) -> None:
    op = getattr(lmkern, name)
    for value in (False, True):
        ours, theirs = (op(**{**arguments(name), option: given}) for given in (value, np.bool_(value)))
        assert type(ours) is type(theirs)


def on_or_off_modules() -> list[tuple[str, str, Callable[[Any], object]]]:
    x = torch.randn(2, 3, 8)
    mha = MultiheadAttention(8, 2)
    encoder = TransformerEncoderLayer(8, 2, 16)
    decoder = TransformerDecoderLayer(8, 2, 16)
    return [
        ("Block", "causal", lambda given: Block(8, 2, 16, causal=given)),
        ("Block", "cross", lambda given: Block(8, 2, 16, cross=given)),
        ("Block", "post_norm", lambda given: Block(8, 2, 16, post_norm=given)),
        ("Block", "bias", lambda given: Block(8, 2, 16, bias=given)),
        ("SelfAttention", "causal", lambda given: SelfAttention(8, 2, causal=given)),
        ("SelfAttention", "bias", lambda given: SelfAttention(8, 2, bias=given)),
        ("CrossAttention", "bias", lambda given: CrossAttention(8, 2, bias=given)),
        ("FeedForward", "bias", lambda given: FeedForward(8, 16, bias=given)),
        ("MultiheadAttention", "need_weights", lambda given: mha(x, x, x, need_weights=given)),
        (
            "MultiheadAttention",
            "average_attn_weights",
            lambda given: mha(x, x, x, average_attn_weights=given),
        ),
        ("MultiheadAttention", "is_causal", lambda given: mha(x, x, x, is_causal=given)),
        ("MultiheadAttention", "is_causal", lambda given: encoder(x, is_causal=given)),
        ("TransformerEncoder", "is_causal", lambda given: TransformerEncoder(encoder, 1)(x, is_causal=given)),
        (
            "TransformerDecoder",
            "is_causal",
            lambda given: TransformerDecoder(decoder, 1)(x, x, tgt_is_causal=given),
        ),
        ("patch", "verbose", lambda given: lmkern.patch(nn.Identity(), verbose=given)),
        (
            "from_pretrained",
            "allow_pickle",
            lambda given: lmkern.models.from_pretrained("nowhere", allow_pickle=given),
        ),
    ]


@pytest.mark.parametrize(
    ("name", "option", "call"), on_or_off_modules(), ids=[f"{m[0]}-{m[1]}" for m in on_or_off_modules()]
)
def test_so_it_is_for_modules(name: str, option: str, call: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: {option} must be True or False; got 'no'$"):
        call("no")


def test_so_it_is_for_the_configuration_of_a_model() -> None:
    with pytest.raises(ValueError, match=r"^GPTConfig: bias must be True or False; got 'no'$"):
        GPTConfig(bias="no")


def test_a_compiler_may_compare_lengths() -> None:
    q = torch.randn(1, 2, 5, 4)

    @torch.compile(backend="eager", dynamic=True, fullgraph=True)
    def compiled(q: torch.Tensor) -> torch.Tensor:
        return lmkern.scaled_dot_product_attention(q, q, q, is_causal=q.shape[2] > 1)

    assert torch.equal(compiled(q), lmkern.scaled_dot_product_attention(q, q, q, is_causal=True))
    assert torch.equal(compiled(q[:, :, :3]), compiled(q)[:, :, :3])


@pytest.mark.parametrize("name", ["gelu", "swiglu", "geglu"])
def test_an_activation_goes_by_the_name_it_was_called_by(name: str) -> None:
    op = getattr(lmkern, name)
    with pytest.raises(ValueError, match=rf"^{name}: x must be one of float32, .*; got torch.int64$"):
        op(torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=rf"^{name}: bias must be \(4,\); got \(3,\)$"):
        op(torch.ones(2, 4), torch.ones(3))
