"""What is no tensor is refused by the name of the argument."""

from inspect import signature

import pytest
import torch

import lmkern

OPS = sorted(set(lmkern.ops.__all__) - {"bucketed_bias"})


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
