"""Linear + cross-entropy on GPUs, by chunks of tokens whose logits are held one chunk at a time.

torch multiplies matrices; a kernel of lmkern/kernels/cross_entropy turns a chunk's logits into its loss and,
in their place, their gradient. Beyond results and the float32 sums of the weight's gradient this takes
the logits of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmkern.kernels import triton_runtime
from lmkern.kernels.cross_entropy import triton as cross_entropy
from lmkern.kernels.linear_cross_entropy.chunks import WeightSum, by_chunks
from lmkern.kernels.triton_runtime import unavailable, unsupported

__all__ = ["NOTE", "backward", "forward", "unavailable", "unsupported"]

NOTE = triton_runtime.NOTE

# A chunk's logits take at most so many bytes, unless it has this few tokens. The weight's gradient is read
# and written once a chunk: in bfloat16, 1536 tokens of 131,072 classes are work enough to hide that.
CHUNK_BYTES = 384 * 2**20
MIN_CHUNK_TOKENS = 128
# Tokens of a chunk are rounded up to a tile of a product.
ROUND_TOKENS = 128


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dloss: Tensor,
    *,
    needs: tuple[bool, bool, bool],
    **options: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    return by_chunks(
        x,
        weight,
        bias,
        targets,
        dloss,
        needs,
        options,
        chunk=chunk_tokens(x.shape[0], weight.shape[0] * x.element_size()),
        cross_entropy=cross_entropy,
        weight_sum=WeightSum,
        input_gradient=_input_gradient,
    )


def backward(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    needs: tuple[bool, bool, bool],
    **options: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return forward(x, weight, bias, targets, dloss, needs=needs, **options)[1:]


def chunk_tokens(R: int, row_bytes: int) -> int:
    """Tokens of a chunk: a function of the shapes alone, and chunks of one size but for the last."""
    most = max(MIN_CHUNK_TOKENS, CHUNK_BYTES // max(row_bytes, 1) // ROUND_TOKENS * ROUND_TOKENS)
    chunks = max(1, -(-R // most))
    return max(1, -(-R // (chunks * ROUND_TOKENS))) * ROUND_TOKENS


def _input_gradient(dlogits: Tensor, weight: Tensor, dx: Tensor) -> None:
    torch.mm(dlogits, weight, out=dx)
