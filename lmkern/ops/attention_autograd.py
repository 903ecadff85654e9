"""Attention as autograd and the compiler see it: the direct path, the registered op, and their gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmkern.kernels import backends
from lmkern.kernels.attention import Options, reference
from lmkern.kernels.statistics import statistics_dtype
from lmkern.ops.attention_checks import check_documents
from lmkern.ops.dispatch import as_tensors, direct, wants_gradient
from lmkern.ops.once_differentiable import once_differentiable
from lmkern.ops.plain_gradients import plain_gradients
from lmkern.ops.registration import call_registered, register_gradients
from lmkern.ops.vjp import leaf, vjp

Gradients = tuple[Tensor | None, ...]

# A registered op takes no dataclass: q, k, v, the fields of Options in their order, backend.
_FIELDS = [field.name for field in dataclasses.fields(Options)]
_SCALARS, _TENSORS = _FIELDS[: _FIELDS.index("seed")], _FIELDS[_FIELDS.index("seed") :]
_DIFFERENTIABLE = ("bias", "relative_bias", "sinks")
_POSITIONS = (0, 1, 2, *(3 + _FIELDS.index(name) for name in _DIFFERENTIABLE))
_OPTIONS = (
    "float softmax_scale, SymInt? left, SymInt? right, bool top_left, float softcap, float dropout_p, "
    "bool exact_lse, Tensor? seed, Tensor? bias, Tensor? mask, Tensor? relative_bias, Tensor? sinks, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, str? backend"
)


def attend(q: Tensor, k: Tensor, v: Tensor, options: Options, backend: str | None) -> tuple[Tensor, Tensor]:
    """out and lse."""
    if not direct(q, k, v, *_of(options, _TENSORS)):
        return call_registered("attention", q, k, v, *_of(options, _FIELDS), backend)  # type: ignore[no-any-return]
    differentiable = (q, k, v, *_of(options, _DIFFERENTIABLE))
    if wants_gradient(*differentiable):
        return _Attention.apply(*differentiable, options, backend)  # type: ignore[no-any-return]
    return _forward(q, k, v, options, backend)


def _forward(q: Tensor, k: Tensor, v: Tensor, options: Options, backend: str | None) -> tuple[Tensor, Tensor]:
    check_documents("attention", options, q.shape[2], k.shape[2])
    return _kernel(q, k, v, options, backend).forward(q, k, v, options)  # type: ignore[no-any-return]


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    backend: str | None,
    needs: Sequence[bool],
) -> Gradients:
    kernel = _kernel(q, k, v, options, backend, backward=True)
    return kernel.backward(dout, q, k, v, out, lse, dlse, options, needs=tuple(needs))  # type: ignore[no-any-return]


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, options: Options, backend: str | None, *, backward: bool = False
) -> Any:
    tensors = {"q": q, "k": k, "v": v}
    more = {"options": options, "backward": backward}
    return backends.select(backends.Call("attention", tensors, more, backend))


class _Attention(torch.autograd.Function):
    """The direct path: the registered op below without the dispatcher in between.

    bias, relative_bias and sinks are arguments beside the options that hold them, for autograd to see.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        q, k, v, _, _, _, options, backend = arguments
        output = _forward(q, k, v, options, backend)
        ctx.set_materialize_grads(False)
        _save(ctx, q, k, v, output, options, backend)
        return output

    @staticmethod
    @plain_gradients
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Gradients:
        q, k, v, out, lse, options = _saved(ctx)
        dout = torch.zeros_like(out) if dout is None else dout
        rest = (options, ctx.backend, ctx.needs_input_grad[:6])
        # Gradients are on in here where the caller asked for a graph of them, and nowhere else.
        if torch.is_grad_enabled():
            differentiable = _of(options, _DIFFERENTIABLE)
            gradients = _Backward.apply(dout, dlse, q, k, v, out, lse, *differentiable, *rest)
        else:
            gradients = _backward(dout, dlse, q, k, v, out, lse, *rest)
        return (*gradients, None, None)


class _Backward(torch.autograd.Function):
    """The kernel's backward pass as something to differentiate: by the reference's formula, once.

    Only a double backward holds the (N_q, N_k) scores.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Gradients:
        dout, dlse, q, k, v, out, lse, _, _, _, options, backend, needs = arguments
        ctx.set_materialize_grads(False)
        _save(ctx, q, k, v, (dout, dlse), options, backend)
        return _backward(dout, dlse, q, k, v, out, lse, options, backend, needs)

    @staticmethod
    @once_differentiable("attention's backward")
    def backward(ctx: Any, *directions: Tensor | None) -> Gradients:
        *saved, options = _saved(ctx)
        q, k, v, dout, dlse = (leaf(x) for x in saved)
        options = dataclasses.replace(options, **{n: leaf(getattr(options, n)) for n in _DIFFERENTIABLE})
        inputs = (q, k, v, *_of(options, _DIFFERENTIABLE))
        with torch.enable_grad():
            first = vjp(reference.attention(q, k, v, options), (dout, dlse), inputs)
            ddout, ddlse, dq, dk, dv, *others = vjp(first, directions, (dout, dlse, *inputs))
        # None for out and lse: what they would hand on is in the gradients of the others already.
        return (ddout, ddlse, dq, dk, dv, None, None, *others, None, None, None)


def _save(
    ctx: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    further: tuple[Tensor, Tensor | None],
    options: Options,
    backend: str | None,
) -> None:
    ctx.scalars, ctx.backend = _of(options, _SCALARS), backend
    ctx.save_for_backward(q, k, v, *further, *_of(options, _TENSORS))


def _saved(ctx: Any) -> tuple[Any, ...]:
    """q, k, v, the two further tensors and the options."""
    q, k, v, first, second, *tensors = ctx.saved_tensors
    return q, k, v, first, second, Options(*ctx.scalars, *tensors)


def _of(options: Options, names: Sequence[str]) -> list[Any]:
    return [getattr(options, name) for name in names]


@torch.library.custom_op(
    "lmkern::attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
)
def _attention_op(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *fields, backend = rest
    return _forward(q, k, v, Options(*fields), backend)


@_attention_op.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=statistics_dtype(q))


@torch.library.custom_op(
    "lmkern::attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OPTIONS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _attention_backward_op(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *fields, backend, needs = rest
    gradients = _backward(dout, dlse, q, k, v, out, lse, Options(*fields), backend, needs)
    return as_tensors(gradients, dout)


@_attention_backward_op.register_fake
def _(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *fields, _, needs = rest
    inputs = zip((q, k, v, *_of(Options(*fields), _DIFFERENTIABLE)), needs, strict=True)
    return tuple(torch.empty_like(x) if x is not None and need else dout.new_empty(0) for x, need in inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *fields, backend = inputs
    _save(ctx, q, k, v, output, Options(*fields), backend)


def _registered_gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Gradients:
    # Through the registered backward, which has no derivative of its own and says so to a double backward.
    q, k, v, out, lse, options = _saved(ctx)
    dout = torch.zeros_like(out) if dout is None else dout
    needs = [ctx.needs_input_grad[position] for position in _POSITIONS]
    gradients = call_registered(
        "attention_backward", dout, dlse, q, k, v, out, lse, *_of(options, _FIELDS), ctx.backend, needs
    )
    placed: list[Tensor | None] = [None] * (3 + len(_FIELDS) + 1)
    for position, gradient, need in zip(_POSITIONS, gradients, needs, strict=True):
        placed[position] = gradient if need else None
    return tuple(placed)


register_gradients("attention", _registered_gradients, _setup_context)
