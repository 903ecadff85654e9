"""Tensors that torch holds as negatives of what lies in memory, as z.conj().imag, which the ops read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lmkern
from lmkern.testing import seeded_randn

TOKENS = torch.tensor([0, 1, 2, 3])
COS, SIN = torch.ones(4, 4).cos(), torch.ones(4, 4).sin()
Op = Callable[[Tensor], Tensor]

# Of x (1, 2, 4, 8).
OPS: dict[str, Op] = {
    "attention": lambda x: lmkern.attention(x, x * 2, x * 3),
    "attention of negatives": lambda x: lmkern.attention(x, x, x),
    "scaled_dot_product_attention": lambda x: lmkern.scaled_dot_product_attention(x, x, x, is_causal=True),
    "layer_norm": lambda x: lmkern.layer_norm(x, 8),
    "rms_norm": lambda x: lmkern.rms_norm(x, 8),
    "add_norm": lambda x: torch.cat(lmkern.add_norm(x, x)),
    "gelu": lmkern.gelu,
    "swiglu": lmkern.swiglu,
    "rotary": lambda x: lmkern.rotary(x, COS, SIN),
    "cast": lambda x: lmkern.cast(x, torch.float64),
    "transposed_copy": lambda x: lmkern.transposed_copy(x[0, 0], x.dtype),
    "embedding": lambda x: lmkern.embedding(TOKENS, x[0, 0]),
    "linear": lambda x: lmkern.linear(x, x[0, 0]),
    "cross_entropy": lambda x: lmkern.cross_entropy(x[0, 0], TOKENS, reduction="none"),
    "linear_cross_entropy": lambda x: lmkern.linear_cross_entropy(x[0, 0], x[0, 1], TOKENS, reduction="none"),
}


def negatives(x: Tensor) -> dict[str, Tensor]:
    return {
        "contiguous": torch._neg_view(-x),
        "every second": torch.complex(torch.zeros_like(x), -x).conj().imag,
    }


@pytest.mark.parametrize("kind", ["contiguous", "every second"])
@pytest.mark.parametrize("name", OPS)
def test_negatives_count_as_such(name: str, kind: str) -> None:
    x = seeded_randn(0, torch.float32)(1, 2, 4, 8)
    negative = negatives(x)[kind]
    assert negative.is_neg()
    torch.testing.assert_close(OPS[name](negative), OPS[name](x))


@pytest.mark.parametrize("kind", ["contiguous", "every second"])
@pytest.mark.parametrize("name", OPS)
def test_gradients_that_come_as_negatives_count_as_such(name: str, kind: str) -> None:
    x = seeded_randn(0, torch.float32)(1, 2, 4, 8).requires_grad_()
    y = OPS[name](x)
    dy = seeded_randn(1, y.dtype)(*y.shape)
    (expected,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (dx,) = torch.autograd.grad(OPS[name](x), x, negatives(dy)[kind])
    torch.testing.assert_close(dx, expected)


def test_caches_and_the_optimizers_step_too() -> None:
    x = seeded_randn(0, torch.float32)(1, 2, 4, 8)
    for negative in negatives(x).values():
        ours = lmkern.cached_attention(negative[:, :, -1:], negative, negative)
        torch.testing.assert_close(ours, lmkern.cached_attention(x[:, :, -1:], x, x))
    results = []
    for grad in (x, negatives(x)["contiguous"]):
        param, first, second = torch.ones_like(x), torch.zeros_like(x), torch.zeros_like(x)
        lmkern.adamw_(
            param, grad, first, second, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=1
        )
        results.append(torch.stack((param, first, second)))
    assert torch.equal(*results)
