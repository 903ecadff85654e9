"""Linear + cross-entropy on the CPU, by chunks of tokens whose logits are held one chunk at a time.

torch multiplies matrices, but for bfloat16 on processors that multiply its pairs (bf16.py); 16-bit ones in
float32 where it has no fast product of them. csrc/cross_entropy turns a chunk's logits into its loss and, in
their place, their gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmkern.kernels import widened
from lmkern.kernels.cpu_call import torch_multiplies, unavailable, unsupported
from lmkern.kernels.cross_entropy import cpu as cross_entropy
from lmkern.kernels.linear_cross_entropy import bf16
from lmkern.kernels.linear_cross_entropy.chunks import WeightSum, by_chunks, multiply_logits

__all__ = ["backward", "forward", "unavailable", "unsupported"]

# A chunk's logits take at most so many bytes, unless it has this few tokens.
_CHUNK_BYTES = 2**27
_CHUNK_TOKENS = 256

# Below this share of tokens that count, they are gathered first: masked language models count 15 in 100.
_GATHERED_SHARE = 0.875


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dloss: Tensor,
    *,
    needs: tuple[bool, bool, bool],
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
    }
    counted = (targets != ignore_index).nonzero().view(-1)
    if counted.shape[0] >= _GATHERED_SHARE * x.shape[0]:
        return _forward(x, weight, bias, targets, dloss, needs, options)
    part = (x[counted], weight, bias, targets[counted], dloss[counted])
    loss, dx, dweight, dbias = _forward(*part, needs, options)
    return _scattered(loss, counted, x), None if dx is None else _scattered(dx, counted, x), dweight, dbias


def _scattered(rows: Tensor, counted: Tensor, x: Tensor) -> Tensor:
    """As many rows as x has: those given, in their places, and zeros."""
    return rows.new_zeros(x.shape[0], *rows.shape[1:]).index_copy_(0, counted, rows)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dloss: Tensor,
    needs: tuple[bool, bool, bool],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    arguments = (x, weight, bias, targets, dloss, needs, options)
    chunk = _chunk_tokens(x.shape[0], weight.shape[0] * x.element_size())
    if bf16.usable(x):
        return bf16.forward(*arguments, chunk=chunk)
    return by_chunks(
        *arguments,
        chunk=chunk,
        cross_entropy=cross_entropy,
        weight_sum=WeightSum,
        input_gradient=_input_gradient,
        make_logits=_make_logits,
    )


def _make_logits(x: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor) -> None:
    multiply = multiply_logits if torch_multiplies(x.dtype) else widened.multiply
    multiply(x, weight, bias, logits)


def _input_gradient(dlogits: Tensor, weight: Tensor, dx: Tensor) -> None:
    if torch_multiplies(dx.dtype):
        torch.mm(dlogits, weight, out=dx)
    else:
        widened.input_gradient(dlogits, weight, dx)


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


def _chunk_tokens(R: int, row_bytes: int) -> int:
    """Tokens of a chunk: a function of the shapes alone, and chunks of one size but for the last."""
    most = max(_CHUNK_TOKENS, _CHUNK_BYTES // max(row_bytes, 1))
    chunks = max(1, -(-R // most))
    return max(bf16.SIDE, bf16.rounded_up(-(-R // chunks)))
