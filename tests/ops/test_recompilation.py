"""torch.compile(fullgraph=True) of each op: one graph, and at most one more over changing batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import lmkern

# The first size is compiled for itself, the second shows which dimension changes. To torch a size of 1 is a
# graph of its own.
BATCHES = (2, 3, 5, 8, 13)
# From a batch size to the arguments of a call of the op with a backend.
Make = Callable[[int], tuple[Any, ...]]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def tokens(*shape: int) -> Tensor:
    return torch.randint(7, shape)


ANGLES = torch.rand(6, 4)
CALLS: dict[str, tuple[Callable[..., Any], Make]] = {
    "attention": (
        partial(lmkern.attention, causal=True),
        lambda B: tuple(randn(B, 4, 6, 8) for _ in range(3)),
    ),
    "cached_attention": (
        lmkern.cached_attention,
        lambda B: tuple(torch.randn(B, 4, n, 8) for n in (1, 6, 6)),
    ),
    "layer_norm": (lmkern.layer_norm, lambda B: (randn(B, 6, 8), (8,), randn(8), randn(8))),
    "rms_norm": (lmkern.rms_norm, lambda B: (randn(B, 6, 8), (8,), randn(8))),
    "add_norm": (lmkern.add_norm, lambda B: (randn(B, 6, 8), randn(B, 6, 8), randn(8), randn(8))),
    "cross_entropy": (lmkern.cross_entropy, lambda B: (randn(6 * B, 7), tokens(6 * B))),
    "linear_cross_entropy": (
        lmkern.linear_cross_entropy,
        lambda B: (randn(6 * B, 8), randn(7, 8), tokens(6 * B)),
    ),
    "rotary": (lmkern.rotary, lambda B: (randn(B, 4, 6, 8), ANGLES.cos(), ANGLES.sin())),
    "gelu": (lmkern.gelu, lambda B: (randn(B, 6, 8), randn(8))),
    "swiglu": (lmkern.swiglu, lambda B: (randn(B, 6, 8), randn(8))),
    "embedding": (lmkern.embedding, lambda B: (tokens(B, 6), randn(7, 8))),
    "cast": (partial(lmkern.cast, dtype=torch.bfloat16), lambda B: (torch.randn(B, 8),)),
    "transposed_copy": (lmkern.transposed_copy, lambda B: (torch.randn(6 * B, 8),)),
}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def graphs(call: Callable[..., Any], make: Make, device: str) -> int:
    """Graphs that were compiled over the batch sizes, forward and backward."""
    counter = CompileCounter()
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for B in BATCHES:
        arguments = [x.to(device) if isinstance(x, Tensor) else x for x in make(B)]
        result = compiled(*arguments)
        first = result if isinstance(result, Tensor) else result[0]
        if first.requires_grad:
            first.sum().backward()
    return counter.frame_count


@pytest.mark.parametrize("name", CALLS)
def test_changing_batch_sizes_compile_at_most_once_more(name: str) -> None:
    assert graphs(*CALLS[name], "cpu") <= 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and none is visible")
@pytest.mark.parametrize("name", CALLS)
def test_changing_batch_sizes_compile_at_most_once_more_on_a_gpu(name: str) -> None:
    assert graphs(*CALLS[name], "cuda") <= 2


def test_recompilations_are_counted() -> None:
    def with_its_own_graph(x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] % 2 else x + 1

    assert graphs(with_its_own_graph, lambda B: (torch.randn(B, 2),), "cpu") > 2
