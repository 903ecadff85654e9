"""A stream of another dtype than the parameters is refused with what to do."""

import pytest
import torch
from torch import nn

from lmkern.nn import (
    Block,
    CrossAttention,
    FeedForward,
    LayerNorm,
    MultiheadAttention,
    RMSNorm,
    SelfAttention,
    TransformerEncoderLayer,
)

TAKE = {
    "SelfAttention": (lambda: SelfAttention(8, 2), "SelfAttention: x", 1),
    "CrossAttention": (lambda: CrossAttention(8, 2), "CrossAttention: x", 2),
    "FeedForward": (lambda: FeedForward(8, 16), "FeedForward: x", 1),
    "MultiheadAttention": (lambda: MultiheadAttention(8, 2), "MultiheadAttention: query", 3),
    "Block": (lambda: Block(8, 2, 16), "SelfAttention: x", 1),
    "TransformerEncoderLayer": (
        lambda: TransformerEncoderLayer(8, 2, 16),
        "MultiheadAttention: query",
        1,
    ),
}


@pytest.mark.parametrize("case", TAKE)
def test_says_what_to_do_and_that_does_it(case: str) -> None:
    make, begins, count = TAKE[case]
    module, x = make(), torch.randn(2, 3, 8, dtype=torch.bfloat16)
    message = (
        rf"^{begins} must have the parameters' dtype torch.float32; got torch.bfloat16. "
        r"Give \w+.to\(torch.float32\), or run the model under torch.autocast\('cpu'\)$"
    )
    with pytest.raises(ValueError, match=message):
        module(*[x] * count)
    module(*[x.to(torch.float32)] * count)
    with torch.autocast("cpu", torch.bfloat16):
        module(*[x] * count)


def test_a_stream_has_a_batch_tokens_and_the_modules_width() -> None:
    attention, cross = SelfAttention(8, 2), CrossAttention(8, 2)
    x = torch.randn(3, 8)
    with pytest.raises(
        ValueError, match=r"SelfAttention: x must be \(B, N, 8\); got \(3, 8\)\. One sequence is x\[None\]$"
    ):
        attention(x)
    attention(x[None])
    with pytest.raises(ValueError, match=r"SelfAttention: x must be \(B, N, 8\); got \(1, 8, 3\)$"):
        attention(x.mT[None])
    with pytest.raises(TypeError, match=r"SelfAttention: x must be a torch.Tensor; got list$"):
        attention([1, 2])
    with pytest.raises(ValueError, match=r"CrossAttention: x must be \(B, N, 8\); got \(3, 8\)"):
        cross(x, x[None])
    with pytest.raises(ValueError, match=r"CrossAttention: memory must be \(B, N, 8\); got \(3, 8\)"):
        cross(x[None], x)


def test_names_the_argument_that_differs_however_it_is_given() -> None:
    x = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match=r"CrossAttention: memory .* Give memory.to\(torch.float32\)$"):
        CrossAttention(8, 2)(x, memory=x.double())


def test_other_failures_are_as_they_were() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        FeedForward(8, 16)(torch.randn(2, 9))


def test_a_layer_that_takes_another_dtype_than_it_stores_is_asked_first() -> None:
    class Widening(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.to(self.weight.dtype)).to(x.dtype)

    module, x = FeedForward(8, 16), torch.randn(2, 8, dtype=torch.bfloat16)
    module.up, module.down = Widening(8, 16), Widening(16, 8)
    assert module(x).dtype == torch.bfloat16


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_a_norm_says_what_to_do_and_that_does_it(norm: type[nn.Module]) -> None:
    module, x = norm(8, dtype=torch.bfloat16), torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"cast one of the two, as by input.to\(torch.bfloat16\)$"):
        module(x)
    module(x.to(torch.bfloat16))
