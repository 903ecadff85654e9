"""Rows of a weight by token, as a differentiable function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmkern.kernels import backends
from lmkern.ops.dispatch import check_dtype, direct, rows, takes_tensors, wants_gradient
from lmkern.ops.once_differentiable import once_differentiable
from lmkern.ops.registration import call_registered, register_gradients


@takes_tensors
def embedding(
    tokens: Tensor, weight: Tensor, *, padding_idx: int | None = None, backend: str | None = None
) -> Tensor:
    """weight[tokens], with a deterministic gradient that is summed in float32.

    tokens: any shape, int64 or int32, each in [0, V).
    weight: (V, E), float32, float16, bfloat16 or float64.
    padding_idx: the token whose row gets no gradient, in [-V, V) as torch counts; or None.
    backend: "triton", "cpu" or "reference"; default the fastest that applies.

    Returns (*tokens.shape, E) in weight's dtype, contiguous. Raises ValueError for shapes and dtypes,
    IndexError for a token outside [0, V) (on a GPU with LMKERN_CHECKED=1; its row is NaN without);
    UnsupportedBackend if the named backend cannot run this here.
    """
    padding = _check(tokens, weight, padding_idx)
    flat = (tokens if tokens.dim() == 1 else tokens.reshape(-1)).long()
    if not direct(flat, weight):
        y = call_registered("embedding", flat, weight, padding, backend)
    elif wants_gradient(weight):
        y = _Embedding.apply(flat, weight, padding, backend)
    else:
        y = _forward(flat, weight, padding, backend)
    return y if tokens.dim() == 1 else y.view(*tokens.shape, weight.shape[1])  # type: ignore[no-any-return]


def _forward(tokens: Tensor, weight: Tensor, padding_idx: int, backend: str | None) -> Tensor:
    kernel = backends.select(backends.Call("embedding", {"weight": weight}, {}, backend))
    return kernel.forward(tokens.contiguous(), weight.contiguous())  # type: ignore[no-any-return]


def _backward(dy: Tensor, tokens: Tensor, vocabulary: int, padding_idx: int, backend: str | None) -> Tensor:
    kernel = backends.select(backends.Call("embedding", {"dy": dy}, {}, backend))
    return kernel.backward(  # type: ignore[no-any-return]
        rows(dy), tokens.contiguous(), vocabulary=vocabulary, padding_idx=padding_idx
    )


class _Embedding(torch.autograd.Function):
    """The direct path: the registered op below without the dispatcher in between."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, padding_idx: int, backend: str | None) -> Tensor:
        y = _forward(tokens, weight, padding_idx, backend)
        _setup_context(ctx, (tokens, weight, padding_idx, backend), y)
        return y

    @staticmethod
    @once_differentiable("embedding")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return None, _backward(dy, *ctx.saved_tensors, *ctx.options), None, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, weight, padding_idx, backend = inputs
    ctx.options = weight.shape[0], padding_idx, backend
    ctx.save_for_backward(tokens)


@torch.library.custom_op("lmkern::embedding", mutates_args=())
def _embedding_op(tokens: Tensor, weight: Tensor, padding_idx: int, backend: str | None) -> Tensor:
    return _forward(tokens, weight, padding_idx, backend)


@_embedding_op.register_fake
def _(tokens: Tensor, weight: Tensor, padding_idx: int, backend: str | None) -> Tensor:
    return weight.new_empty(tokens.shape[0], weight.shape[1])


@torch.library.custom_op("lmkern::embedding_backward", mutates_args=())
def _embedding_backward_op(
    dy: Tensor, tokens: Tensor, vocabulary: int, padding_idx: int, backend: str | None
) -> Tensor:
    return _backward(dy, tokens, vocabulary, padding_idx, backend)


@_embedding_backward_op.register_fake
def _(dy: Tensor, tokens: Tensor, vocabulary: int, padding_idx: int, backend: str | None) -> Tensor:
    return dy.new_empty(vocabulary, dy.shape[1])


def _registered_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    # Through the registered backward, which has no derivative of its own and says so to a double backward.
    dweight = call_registered("embedding_backward", dy, *ctx.saved_tensors, *ctx.options)
    return None, dweight, None, None


register_gradients("embedding", _registered_gradients, _setup_context)


def _check(tokens: Tensor, weight: Tensor, padding_idx: int | None) -> int:
    """padding_idx in [0, V), -1 for None; ValueError in words for what no backend can make sense of."""
    check_dtype("embedding", "weight", weight.dtype)
    if weight.dim() != 2:
        raise ValueError(f"embedding: weight must be (V, E); got {tuple(weight.shape)}")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"embedding: tokens must be int64 or int32; got {tokens.dtype}")
    if tokens.device != weight.device:
        raise ValueError(f"embedding: tokens must be on weight's device {weight.device}; got {tokens.device}")
    vocabulary = weight.shape[0]
    if padding_idx is None:
        return -1
    if not -vocabulary <= padding_idx < vocabulary:
        raise ValueError(
            f"embedding: padding_idx must be in [-{vocabulary}, {vocabulary}); got {padding_idx}"
        )
    return padding_idx % vocabulary
