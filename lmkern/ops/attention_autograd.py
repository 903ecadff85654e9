"""Attention as autograd and the compiler see it: the direct path, the registered op, and their gradients.

Arguments travel flat, since a registered op takes no dataclass: q, k, v, the fields of Options in their
order, backend. Those of the backward pass: dout, dlse, q, k, v, out, lse, the fields, backend, needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lmkern.kernels import backends
from lmkern.kernels.attention import Options, reference
from lmkern.ops.attention_checks import check_documents
from lmkern.ops.dispatch import direct, statistics_dtype

Gradients = tuple[Tensor | None, ...]

_FIELDS = [field.name for field in dataclasses.fields(Options)]
_SCALARS = _FIELDS.index("seed")  # tensors from here on
# Where q, k, v, bias, relative_bias and sinks stand among the arguments.
_DIFFERENTIABLE = (0, 1, 2, *(3 + _FIELDS.index(name) for name in ("bias", "relative_bias", "sinks")))
_ARGUMENTS = 3 + len(_FIELDS) + 1

_OPTIONS = (
    "float softmax_scale, SymInt? left, SymInt? right, bool top_left, float softcap, float dropout_p, "
    "Tensor? seed, Tensor? bias, Tensor? mask, Tensor? relative_bias, Tensor? sinks, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, str? backend"
)


def attend(q: Tensor, k: Tensor, v: Tensor, options: Options, backend: str | None) -> tuple[Tensor, Tensor]:
    """out and lse."""
    fields = [getattr(options, name) for name in _FIELDS]
    if direct(q, k, v, *fields[_SCALARS:]):
        return _Attention.apply(q, k, v, *fields, backend)  # type: ignore[no-any-return]
    return torch.ops.lmkern.attention(q, k, v, *fields, backend)  # type: ignore[no-any-return]


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *fields, backend = rest
    options = Options(*fields)
    check_documents("attention", options, q.shape[2], k.shape[2])
    return _kernel(q, k, v, options, backend).forward(q, k, v, options)  # type: ignore[no-any-return]


def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> Gradients:
    *fields, backend, needs = rest
    options = Options(*fields)
    kernel = _kernel(q, k, v, options, backend)
    return kernel.backward(dout, q, k, v, out, lse, dlse, options, needs=tuple(needs))  # type: ignore[no-any-return]


def _kernel(q: Tensor, k: Tensor, v: Tensor, options: Options, backend: str | None) -> Any:
    tensors = {"q": q, "k": k, "v": v}
    return backends.select(backends.Call("attention", tensors, {"options": options}, backend))


class _Attention(torch.autograd.Function):
    """The direct path: the registered op below without the dispatcher in between."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*arguments)
        ctx.set_materialize_grads(False)
        _setup_context(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Gradients:
        # Gradients are on in here where the caller asked for a graph of them, and nowhere else.
        return _gradients(ctx, dout, dlse, _Backward.apply if torch.is_grad_enabled() else _backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *fields, ctx.backend = inputs
    ctx.scalars = fields[:_SCALARS]
    ctx.save_for_backward(q, k, v, *output, *fields[_SCALARS:])


def _gradients(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, backward: Callable[..., Gradients]
) -> Gradients:
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    needs = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    return _placed(backward(dout, dlse, q, k, v, out, lse, *ctx.scalars, *tensors, ctx.backend, needs))


def _placed(gradients: Sequence[Tensor | None]) -> Gradients:
    """One gradient for each argument of the op, given the six."""
    placed: list[Tensor | None] = [None] * _ARGUMENTS
    for position, gradient in zip(_DIFFERENTIABLE, gradients, strict=True):
        placed[position] = gradient
    return tuple(placed)


class _Backward(torch.autograd.Function):
    """The kernel's backward pass as something to differentiate: by the reference's formula, once.

    Only a double backward holds the (N_q, N_k) scores.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Gradients:
        dout, dlse, q, k, v, _, _, *fields, _, _ = arguments
        ctx.set_materialize_grads(False)
        ctx.scalars = fields[:_SCALARS]
        ctx.save_for_backward(dout, dlse, q, k, v, *fields[_SCALARS:])
        return _backward(*arguments)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *directions: Tensor | None) -> Gradients:
        saved: list[Any] = [
            x if x is None else x.detach().requires_grad_(x.is_floating_point()) for x in ctx.saved_tensors
        ]
        dout, dlse, q, k, v, *tensors = saved
        options = Options(*ctx.scalars, *tensors)
        inputs = (q, k, v, options.bias, options.relative_bias, options.sinks)
        with torch.enable_grad():
            first = _vjp(reference.attention(q, k, v, options), (dout, dlse), inputs)
            ddout, ddlse, *gradients = _vjp(first, directions, (dout, dlse, *inputs))
        placed = _placed(gradients)
        # None for out and lse: what they would hand on is in the gradients of the others already.
        return (ddout, ddlse, *placed[:3], None, None, *placed[3:], None)


def _vjp(
    outputs: Sequence[Tensor | None], cotangents: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradient of each input, itself differentiable; None where an input is None or has no influence."""
    pairs = [
        (output, cotangent)
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if output is not None and cotangent is not None and output.requires_grad
    ]
    present = [x for x in inputs if x is not None]
    if not pairs:
        return [None] * len(inputs)
    found = iter(
        torch.autograd.grad(
            [output for output, _ in pairs],
            present,
            [cotangent for _, cotangent in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [None if x is None else next(found) for x in inputs]


@torch.library.custom_op(
    "lmkern::attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
)
def _attention_op(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _forward(*arguments)


@_attention_op.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=statistics_dtype(q))


@torch.library.custom_op(
    "lmkern::attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OPTIONS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _attention_backward_op(dout: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    # A registered op returns tensors only; a gradient nobody asked for is an empty one.
    return tuple(dout.new_empty(0) if x is None else x for x in _backward(dout, *rest))


@_attention_backward_op.register_fake
def _(dout: Tensor, dlse: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    q, k, v, _, _, *fields, _, needs = rest
    options = Options(*fields)
    inputs = (q, k, v, options.bias, options.relative_bias, options.sinks)
    return tuple(
        torch.empty_like(x) if x is not None and need else dout.new_empty(0)
        for x, need in zip(inputs, needs, strict=True)
    )


def _registered_backward(*arguments: Any) -> Gradients:
    gradients = torch.ops.lmkern.attention_backward(*arguments)
    return tuple(gradient if need else None for gradient, need in zip(gradients, arguments[-1], strict=True))


def _registered_gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Gradients:
    # Through the registered backward, which has no derivative of its own and says so to a double backward.
    return _gradients(ctx, dout, dlse, _registered_backward)


torch.library.register_autograd("lmkern::attention", _registered_gradients, setup_context=_setup_context)
