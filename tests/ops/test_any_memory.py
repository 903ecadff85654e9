"""Every op on the CPU: inputs and gradients may lie in memory in any way, also 2^31 elements apart."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lmkern
from lmkern.testing import targets

TARGETS = [target for target in targets("layer_norm") if target.backend == "cpu"]
DTYPE = torch.bfloat16
ROWS, COLUMNS = 2, 40
TABLE = torch.linspace(-1, 1, ROWS * COLUMNS // 2).view(ROWS, COLUMNS // 2)
ONES, ZEROS = torch.ones(COLUMNS, dtype=DTYPE), torch.zeros(COLUMNS, dtype=DTYPE)
TOKENS = torch.tensor([1, 0, 1])
WEIGHT = torch.linspace(-1, 1, 24 * COLUMNS, dtype=DTYPE).view(24, COLUMNS)

# Functions of x (ROWS, COLUMNS), as one or two of the op's tensors, to (rows, columns).
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "activation": lambda x: lmkern.gelu(x, backend="cpu"),
    "activation, gated": lambda x: lmkern.geglu(x, ONES, backend="cpu"),
    "add_norm": lambda x: lmkern.add_norm(x, x, ONES, ZEROS, backend="cpu")[0],
    "attention": lambda x: lmkern.attention(*[x[None, None]] * 3, causal=True, backend="cpu")[0, 0],
    "copy": lambda x: lmkern.cast(x, torch.float32, backend="cpu"),
    "copy, transposed": lambda x: lmkern.transposed_copy(x, torch.float32, backend="cpu"),
    "cross_entropy": lambda x: lmkern.cross_entropy(x, TOKENS[:2], reduction="none", backend="cpu")[None],
    "embedding": lambda x: lmkern.embedding(TOKENS, x, backend="cpu"),
    "layer_norm": lambda x: lmkern.layer_norm(x, (COLUMNS,), ONES, ZEROS, backend="cpu"),
    "linear_cross_entropy": lambda x: lmkern.linear_cross_entropy(
        x, WEIGHT, TOKENS[:2], reduction="none", backend="cpu"
    )[None],
    "rms_norm": lambda x: lmkern.rms_norm(x, (COLUMNS,), ONES, backend="cpu"),
    "rotary": lambda x: lmkern.rotary(x[None, None], TABLE, TABLE, backend="cpu")[0, 0],
}


def far_apart(x: Tensor) -> Tensor:
    """The first and the last row 2^31 elements apart; only the pages that are written take memory."""
    distance = 2**31 // max(len(x) - 1, 1) + 24
    memory = torch.empty((len(x) - 1) * distance + x.shape[1], dtype=x.dtype)
    y = memory.as_strided(x.shape, (distance, 1))
    return y.copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "an element off": lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape),
    "columns": lambda x: x.mT.contiguous().mT,
    "every second": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one row for all": lambda x: x[:1].expand(x.shape),
    "one number for all": lambda x: x[:1, :1].expand(x.shape),
    "far apart": far_apart,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", CALLS)
def test_every_layout_gives_the_same_bits(op: str, layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    given = LAYOUTS[layout](torch.randn(ROWS, COLUMNS, generator=generator).to(DTYPE))
    for target in TARGETS:
        with target.active():
            x, plain = given.detach().requires_grad_(), given.detach().contiguous().requires_grad_()
            y, expected = CALLS[op](x), CALLS[op](plain)
            assert torch.equal(y, expected), target
            dy = LAYOUTS[layout](torch.randn(y.shape, generator=generator).to(y.dtype))
            (dx,) = torch.autograd.grad(y, x, dy)
            (wanted,) = torch.autograd.grad(expected, plain, dy.contiguous())
            assert torch.equal(dx, wanted), target


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_cache_gives_the_same_bits(layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    cache = LAYOUTS[layout](torch.randn(ROWS, COLUMNS, generator=generator).to(DTYPE))
    for target in TARGETS:
        with target.active():
            x, plain = cache[None, None], cache.contiguous()[None, None]
            out = lmkern.cached_attention(x, x, x, backend="cpu")
            assert torch.equal(out, lmkern.cached_attention(plain, plain, plain, backend="cpu")), target
