"""The residual stream between two halves: what waits for the next norm is what would have been added."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmkern.nn import Block, Dropout, LayerNorm, RMSNorm, Rotary
from lmkern.nn.block import in_turn
from lmkern.nn.residual import Seam, closed, normed

DTYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]


def seam(stream: torch.dtype, branch: torch.dtype, p: float = 0.0) -> Seam:
    torch.manual_seed(0)
    return Seam(torch.randn(3, 5, 40).to(stream), torch.randn(3, 5, 40).to(branch), p)


@pytest.mark.parametrize("norm", [LayerNorm(40), RMSNorm(40, eps=1e-6), RMSNorm(40), nn.LayerNorm(40)])
@pytest.mark.parametrize(("stream", "branch"), DTYPES, ids=str)
def test_the_norm_of_a_seam_is_that_of_the_sum(
    norm: nn.Module, stream: torch.dtype, branch: torch.dtype
) -> None:
    x = seam(stream, branch)
    if stream == torch.bfloat16:
        norm = norm.to(torch.bfloat16)
    y, h = normed(norm, x)
    assert torch.equal(h, closed(x))
    assert h.dtype == stream
    # The one rounding to the branch's dtype is what a product under autocast does next.
    torch.testing.assert_close(y.to(branch), norm(h).to(branch))
    norm.float()


def test_what_listens_is_called() -> None:
    x = seam(torch.float32, torch.float32)
    norm, dropout, heard = LayerNorm(40), Dropout(0.5).eval(), []
    handles = [part.register_forward_hook(lambda *seen: heard.append(seen[0])) for part in (norm, dropout)]
    y, h = normed(norm, Seam.of(x.stream, x.branch, dropout))
    assert heard == [dropout, norm]
    for handle in handles:
        handle.remove()
    assert torch.equal(normed(norm, x)[0], y)
    assert torch.equal(normed(norm, x)[1], h)
    assert len(heard) == 2


def test_dropout_falls_on_the_branch_in_training_alone() -> None:
    x = seam(torch.float32, torch.float32)
    stream, branch = torch.zeros_like(x.stream), torch.ones_like(x.branch)
    dropout = Dropout(0.25)
    for made in (
        normed(LayerNorm(40), Seam.of(stream, branch, dropout))[1],
        closed(Seam.of(stream, branch, dropout)),
    ):
        assert made.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert torch.equal(closed(Seam.of(stream, branch, dropout.eval())), branch)


def test_a_forward_that_was_put_in_a_modules_place_is_called() -> None:
    norm, dropout, block, called = LayerNorm(16), Dropout(0.5).eval(), Block(16, 2, 32), []
    x = torch.randn(2, 9, 16)

    def override(module: nn.Module) -> None:
        theirs = module.forward

        def forward(x: Tensor) -> Tensor:
            called.append(module)
            return theirs(x)

        module.forward = forward  # type: ignore[method-assign]

    for module in (norm, dropout, block):
        override(module)
    normed(norm, Seam.of(x, x, dropout))
    assert isinstance(in_turn([block, block], x), Tensor)
    assert called == [dropout, norm, block, block]


def test_a_hook_on_all_modules_sees_tensors() -> None:
    seen: list[Any] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: seen.extend((*inputs, output)) if type(module) is Block else None
    )
    try:
        in_turn([Block(16, 2, 32), Block(16, 2, 32)], torch.randn(2, 9, 16))
    finally:
        handle.remove()
    assert [type(each) for each in seen] == [Tensor] * 4


class Listening(nn.Module):
    """A block inside something else, as wrappers have it."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, **arguments: Any) -> Tensor:
        assert isinstance(x, Tensor)
        return self.block(x, **arguments)


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_blocks_in_turn_are_blocks_one_by_one(norm: Any, post_norm: bool) -> None:
    torch.manual_seed(1)
    rotary = Rotary(8, 16)
    blocks = [Block(16, 2, 32, rotary=rotary, norm=norm, post_norm=post_norm) for _ in range(4)]
    x = torch.randn(2, 9, 16, requires_grad=True)
    parameters = [x, *(p for block in blocks for p in block.parameters())]

    def gradients(y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(y.square().sum(), parameters))

    one_by_one = x
    for block in blocks:
        one_by_one = block(one_by_one)
    expected = gradients(one_by_one)
    heard: list[Any] = []
    mixed = [blocks[0], Listening(blocks[1]), blocks[2], blocks[3]]
    for modules in (blocks, mixed):
        y = closed(in_turn(modules, x))
        torch.testing.assert_close(y, one_by_one)
        torch.testing.assert_close(gradients(y), expected)
    blocks[2].register_forward_hook(lambda module, inputs, output: heard.extend((*inputs, output)))
    torch.testing.assert_close(closed(in_turn(blocks, x)), one_by_one)
    assert len(heard) == 2
    assert all(isinstance(seen, Tensor) for seen in heard)
