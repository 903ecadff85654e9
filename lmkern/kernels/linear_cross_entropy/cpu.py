"""Linear + cross-entropy on the CPU, by chunks of tokens whose logits are held one chunk at a time.

torch multiplies matrices; csrc/cross_entropy turns a chunk's logits into its loss and, in their place, their
gradient. In bfloat16 with AMX the weight's gradient is a product of our own, csrc/linear_cross_entropy:
torch has none of bfloat16 into float32.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from lmkern.kernels import cpu_call, native
from lmkern.kernels.backends import Call
from lmkern.kernels.cpu_call import on_huge_pages, pointer, unavailable
from lmkern.kernels.cross_entropy import cpu as cross_entropy
from lmkern.kernels.linear_cross_entropy.chunks import WeightSum, by_chunks

__all__ = ["backward", "forward", "unavailable", "unsupported"]

# WeightGradientParams: 5 pointers; x_stride, dlogits_stride, tokens, vocabulary, width, first, threads.
_WEIGHT_PARAMS = struct.Struct("=5q 7q")
# InputGradientParams: 3 pointers; dlogits_stride, weight_stride, tokens, vocabulary, width, threads.
_INPUT_PARAMS = struct.Struct("=3q 6q")

# A chunk's logits take at most so many bytes, unless it has this few tokens.
_CHUNK_BYTES = 2**27
_CHUNK_TOKENS = 256
# What the tokens of a chunk, V and E are rounded up to in csrc/linear_cross_entropy.
_SIDE = 32

# Tokens from which on our own product gives dx: it shares them out among the threads by 256.
_AMX_TOKENS = 512

# Below this share of tokens that count, they are gathered first: masked language models count 15 in 100.
_GATHERED_SHARE = 0.875


def unsupported(call: Call) -> str | None:
    return cpu_call.unsupported(call)


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
    return by_chunks(
        x,
        weight,
        bias,
        targets,
        dloss,
        needs,
        options,
        chunk=_chunk_tokens(x.shape[0], weight.shape[0] * x.element_size()),
        cross_entropy=cross_entropy,
        weight_sum=_AmxWeightSum if _amx(x) else WeightSum,
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


def _chunk_tokens(R: int, row_bytes: int) -> int:
    """Tokens of a chunk: a function of the shapes alone, and chunks of one size but for the last."""
    most = max(_CHUNK_TOKENS, _CHUNK_BYTES // max(row_bytes, 1))
    chunks = max(1, -(-R // most))
    return _rounded_up(-(-R // chunks))


def _rounded_up(n: int) -> int:
    return max(_SIDE, -(-n // _SIDE) * _SIDE)


def _amx(x: Tensor) -> bool:
    """Whether the products of our own take tensors of x's dtype."""
    return x.dtype == torch.bfloat16 and hasattr(native.module(x.dtype), "weight_gradient_add")


def _input_gradient(dlogits: Tensor, weight: Tensor, dx: Tensor) -> None:
    """dx (T, E) = dlogits (T, V) @ weight (V, E)."""
    if not _amx(dx) or dx.shape[0] < _AMX_TOKENS or weight.stride(1) != 1:
        torch.mm(dlogits, weight, out=dx)
        return
    native.module(dx.dtype).input_gradient(
        _INPUT_PARAMS.pack(
            *(pointer(tensor) for tensor in (dlogits, weight, dx)),
            dlogits.stride(0),
            weight.stride(0),
            dx.shape[0],
            *weight.shape,
            native.threads(),
        )
    )


class _AmxWeightSum:
    """dlogits^T @ x summed over chunks in bfloat16 on AMX; float32 sums."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        rows, columns = (_rounded_up(n) for n in weight.shape)
        self.sums = on_huge_pages(weight.new_empty(rows * columns, dtype=torch.float32))
        self.chunks = 0

    def add(self, dlogits: Tensor, x: Tensor) -> None:
        x = x if x.stride(1) == 1 else x.contiguous()
        packed_x = x.new_empty(_rounded_up(x.shape[0]) * _rounded_up(x.shape[1]))
        native.module(x.dtype).weight_gradient_add(self._pack(x, dlogits, packed_x, None, x.shape[0]))
        self.chunks += 1

    def result(self) -> Tensor:
        dweight = on_huge_pages(self.weight.new_empty(self.weight.shape))
        if self.chunks == 0:
            return dweight.zero_()
        native.module(dweight.dtype).weight_gradient_store(self._pack(None, None, None, dweight, 0))
        return dweight

    def _pack(
        self,
        x: Tensor | None,
        dlogits: Tensor | None,
        packed_x: Tensor | None,
        dweight: Tensor | None,
        tokens: int,
    ) -> bytes:
        return _WEIGHT_PARAMS.pack(
            *(pointer(tensor) for tensor in (x, dlogits, packed_x, self.sums, dweight)),
            0 if x is None else x.stride(0),
            0 if dlogits is None else dlogits.stride(0),
            tokens,
            *self.weight.shape,
            self.chunks == 0,
            native.threads(),
        )
