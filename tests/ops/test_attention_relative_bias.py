"""Relative biases of `lmkern.attention`: vectors over the distance, ALiBi, T5's buckets."""

import math

import numpy as np
import pytest
import torch

import lmkern
from lmkern.ops import alibi, bucketed_bias
from lmkern.testing import (
    AttentionShape,
    attention_inputs,
    leaves,
    seeded_randn,
)

# More keys than queries.
SHAPE = AttentionShape(2, 4, 70, 24, 90, 2)


def test_relative_bias_and_sinks_of_any_strides() -> None:
    q, k, v, _ = attention_inputs(SHAPE, torch.float32)
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
    q, k, v, _ = attention_inputs(SHAPE, torch.float64)
    slopes = torch.rand(4, dtype=torch.float64)
    offset = torch.arange(90) - torch.arange(70)[:, None] - 20
    expected = (
        q @ k.repeat_interleave(2, 1).mT / math.sqrt(24) - slopes[:, None, None] * offset.abs()
    ).softmax(-1)
    out = lmkern.attention(q, k, v, alibi_slopes=slopes)
    torch.testing.assert_close(out, expected @ v.repeat_interleave(2, 1))
    assert torch.equal(out, lmkern.attention(q, k, v, relative_bias=alibi(slopes, 70, 90)))


def test_alibi_beside_a_relative_bias_of_more_reach_adds_to_it() -> None:
    q, k, v, _ = attention_inputs(SHAPE, torch.float64)
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
