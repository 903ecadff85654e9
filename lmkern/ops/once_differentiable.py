"""Gradients that have no derivative of their own, and say so to whoever asks for one."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from lmkern.ops.plain_gradients import plain_gradients

Backward = Callable[..., tuple[Tensor | None, ...]]


def once_differentiable(op: str) -> Callable[[Backward], Backward]:
    """A decorator of an autograd.Function's backward, whose gradients raise where they are differentiated.

    torch's own decorator notices only a gradient that came in with a graph, and hangs its refusal where
    torch.autograd.grad never passes: the derivative with respect to what the op was given, which is most of
    it, is then left out without a word. Here the refusal stands between the gradients and everything they
    were computed from: what came in and what was saved.
    """

    def decorate(backward: Backward) -> Backward:
        @plain_gradients
        @wraps(backward)
        def guarded(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
            # Gradients are on in here where the caller asked for a graph of them, and nowhere else.
            if not torch.is_grad_enabled():
                return backward(ctx, *incoming)
            read = _ReadOnce(ctx)
            with torch.no_grad():
                gradients = backward(read, *incoming)
            return _Refusal.apply(op, len(gradients), *gradients, *incoming, *read.saved_tensors)  # type: ignore[no-any-return]

        return guarded

    return decorate


class _ReadOnce:
    """A context whose saved tensors are unpacked once: a checkpoint hands them out no second time."""

    def __init__(self, ctx: Any) -> None:
        self.__dict__.update(_ctx=ctx, saved_tensors=ctx.saved_tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._ctx, name, value)


class _Refusal(torch.autograd.Function):
    """The gradients as they are, with an edge to each tensor that they depend on."""

    @staticmethod
    def forward(ctx: Any, op: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.op = op
        return tuple(None if x is None else x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_directions: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            f"lmkern: the gradients of {ctx.op} have no derivative (it is once_differentiable); where one is "
            "wanted take torch's own function in its place"
        )
