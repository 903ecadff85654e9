"""Poisoned memory covers what the kernels allocate, and ends with its block."""

import pytest
import torch
from torch import Tensor

import lmkern
from lmkern.kernels import native
from lmkern.testing import poisoned_memory


def test_every_way_to_allocate_is_poisoned() -> None:
    x = torch.zeros(2, 3, 4).transpose(0, 1)
    with poisoned_memory():
        for y in (
            torch.empty(5),
            torch.empty_like(x),
            torch.empty_like(x.bfloat16()),
            x.new_empty(5),
            x.new_empty((2, 2), dtype=torch.float64),
            torch.empty_strided((2, 2), (1, 2)),
            torch.empty(5, dtype=torch.float16),
        ):
            assert y.isnan().all()


def test_switches_are_put_back_even_after_an_error() -> None:
    with pytest.raises(KeyError), poisoned_memory():
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("op", ["attention_forward", "layer_norm_forward"])
def test_kernel_that_writes_nothing_is_seen(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "function", lambda name, dtype: lambda packed: None)
    q = torch.zeros(1, 1, 2, 4)
    with poisoned_memory():
        result: Tensor
        if op == "attention_forward":
            result = lmkern.attention(q, q, q, backend="cpu")
        else:
            result = lmkern.layer_norm(q, (4,), backend="cpu")
    assert result.isnan().all()
