"""What autograd hands to a backward pass, made plain; and vmap, one call after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def of_each(
    call: Callable[..., Any], dims: Sequence[Any], size: int, arguments: Sequence[Any]
) -> tuple[Any, Any]:
    """What a vmap rule of torch.func returns: the results of each call, stacked, and their batch dimensions.

    dims: each argument's batch dimension, of that size; anything but a number for one that all calls share.
    """
    batched = [isinstance(dim, int) for dim in dims]
    parts = [_parts(x, dim) if has else x for x, dim, has in zip(arguments, dims, batched, strict=True)]
    results = [
        call(*(x[i] if has else x for x, has in zip(parts, batched, strict=True))) for i in range(size or 1)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results)[:size], 0
    stacked = tuple(
        None if each[0] is None else torch.stack(each)[:size] for each in zip(*results, strict=True)
    )
    return stacked, tuple(None if x is None else 0 for x in stacked)


def _parts(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """What each call has of x. No calls at all: zeros for one, which tells what the results look like."""
    return x.unbind(dim) if x.shape[dim] else (x.new_zeros(x.shape[:dim] + x.shape[dim + 1 :]),)


def plain_gradients(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """A decorator of an autograd.Function's backward: gradients come in as numbers in memory.

    Autograd hands on negatives as such (z.conj().imag), zeros without memory, and for
    torch.autograd.grad(is_grads_batched=True) and functional.jacobian(vectorize=True) batches that look like
    one gradient.
    """

    @wraps(backward)
    def served(ctx: Any, *incoming: Tensor | None) -> Gradients:
        if torch._C._dispatch_tls_is_dispatch_key_included("VmapMode"):
            return _of_autograd(partial(served, ctx), incoming)
        if torch._C._are_functorch_transforms_active():
            return _OfFunctorch.apply(partial(served, ctx), *incoming)  # type: ignore[no-any-return]
        return backward(ctx, *map(_in_memory, incoming))

    return served


def _in_memory(gradient: Tensor | None) -> Tensor | None:
    if gradient is None:
        return None
    return torch.zeros_like(gradient) if gradient._is_zerotensor() else gradient.resolve_neg()


def _of_autograd(call: Callable[..., Gradients], incoming: Sequence[Tensor | None]) -> Gradients:
    """Under the vmap of torch.autograd.grad, whose levels are numbered by their depth."""
    level = torch._C._vmapmode_decrement_nesting() + 1
    try:
        # What is in no batch comes as a batch of one.
        given = [None if x is None else torch._remove_batch_dim(x, level, 1, 0) for x in incoming]
        size = max(len(x) for x in given if x is not None)
        given = [x if x is None or len(x) == size else x.expand(size, *x.shape[1:]) for x in given]
        results, _ = of_each(call, [None if x is None else 0 for x in given], size, given)
    finally:
        torch._C._vmapmode_increment_nesting()
    return tuple(None if x is None else torch._add_batch_dim(x, 0, level) for x in results)


class _OfFunctorch(torch.autograd.Function):
    """A backward pass under torch.func.vmap."""

    @staticmethod
    def forward(call: Callable[..., Gradients], *incoming: Tensor | None) -> Gradients:
        return call(*incoming)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_directions: Tensor | None) -> Gradients:
        raise RuntimeError("lmkern: a gradient that was computed inside torch.func's grad has no derivative")

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], call: Any, *incoming: Tensor | None) -> tuple[Any, Any]:
        return of_each(call, in_dims[1:], info.batch_size, incoming)
