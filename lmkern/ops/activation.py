"""Activations with their bias, gated or not, as differentiable functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lmkern.kernels import backends
from lmkern.kernels.activation import FUNCTIONS
from lmkern.kernels.statistics import statistics_dtype
from lmkern.ops.dispatch import (
    as_optional,
    as_tensors,
    check_dtype,
    direct,
    fake_gradients,
    flag,
    rows,
    takes_tensors,
    wants_gradient,
)
from lmkern.ops.once_differentiable import once_differentiable
from lmkern.ops.registration import call_registered, register_gradients

Function = Literal["gelu", "gelu_tanh", "silu", "relu", "relu_squared"]


@takes_tensors
def activation(
    x: Tensor,
    bias: Tensor | None = None,
    function: Function = "gelu",
    *,
    gated: bool = False,
    backend: str | None = None,
) -> Tensor:
    """f(x + bias), or with gated=True f(gate) * value with gate and value the halves of x + bias.

    x: (..., F), gated (..., 2F) with the gate in the first F columns. float32, float16, bfloat16 or float64,
        any strides.
    bias: (F,) or (2F,), in x's dtype, or float32 beside a 16-bit x; or None.
    function: "gelu" (exact), "gelu_tanh", "silu", "relu" or "relu_squared".
    backend: "triton", "cpu" or "reference"; default the fastest that applies.

    Returns (..., F) in x's dtype, contiguous, computed in float32 (float64 for float64). Backward keeps x and
    bias only, and sums the gradient of bias in float32. Raises ValueError for shapes, dtypes and names;
    UnsupportedBackend if the named backend cannot run this here. Derivatives: docs/kernels/activation.md.
    """
    return _activated("activation", x, bias, function, flag("activation", "gated", gated), backend)


@takes_tensors
def gelu(
    x: Tensor,
    bias: Tensor | None = None,
    approximate: Literal["none", "tanh"] = "none",
    *,
    backend: str | None = None,
) -> Tensor:
    """(x + bias) P(X <= x + bias), X standard normal; or its approximation by a hyperbolic tangent.

    torch.nn.functional.gelu with a bias. Arguments, results and errors are those of `activation`.
    Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    return _activated("gelu", x, bias, _gelu_function("gelu", approximate), False, backend)


@takes_tensors
def swiglu(x: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """silu(gate) * value of x (..., 2F), the gate first. As `activation`. Shazeer 2020, arXiv:2002.05202."""
    return _activated("swiglu", x, bias, "silu", True, backend)


@takes_tensors
def geglu(
    x: Tensor,
    bias: Tensor | None = None,
    approximate: Literal["none", "tanh"] = "none",
    *,
    backend: str | None = None,
) -> Tensor:
    """gelu(gate) * value of x (..., 2F), the gate first. As `activation`. Shazeer 2020, arXiv:2002.05202."""
    return _activated("geglu", x, bias, _gelu_function("geglu", approximate), True, backend)


def _gelu_function(op: str, approximate: str) -> Function:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{op}: approximate must be 'none' or 'tanh'; got {approximate!r}")
    return "gelu" if approximate == "none" else "gelu_tanh"


def _activated(
    name: str, x: Tensor, bias: Tensor | None, function: Function, gated: bool, backend: str | None
) -> Tensor:
    """The activation, which calls itself in errors as its caller called it."""
    _check(name, x, bias, function, gated)
    # (R, F) or (R, 2F)
    flat = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if not direct(x, bias):
        y = call_registered("activation", flat, bias, function, gated, backend)
    elif wants_gradient(x, bias):
        y = _Activation.apply(flat, bias, function, gated, backend)
    else:
        y = _forward(flat, bias, function, gated, backend)
    return y if flat is x else y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]


def _forward(x: Tensor, bias: Tensor | None, function: str, gated: bool, backend: str | None) -> Tensor:
    kernel = backends.select(backends.Call("activation", {"x": x, "bias": bias}, {}, backend))
    return kernel.forward(rows(x), _wide(bias), function=function, gated=gated)  # type: ignore[no-any-return]


def _backward(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    function: str,
    gated: bool,
    backend: str | None,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    kernel = backends.select(backends.Call("activation", {"x": x, "bias": bias}, {}, backend))
    dx, dbias = kernel.backward(
        rows(dy), rows(x), _wide(bias), function=function, gated=gated, needs=tuple(needs)
    )
    return dx, None if dbias is None or bias is None else dbias.to(bias.dtype)


class _Activation(torch.autograd.Function):
    """The direct path: the registered op below without the dispatcher in between."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, function: str, gated: bool, backend: str | None
    ) -> Tensor:
        y = _forward(x, bias, function, gated, backend)
        _setup_context(ctx, (x, bias, function, gated, backend), y)
        return y

    @staticmethod
    @once_differentiable("an activation")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dy, _backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, *ctx.options = inputs
    ctx.save_for_backward(x, bias)


def _gradients(
    ctx: Any, dy: Tensor, backward: Callable[..., tuple[Tensor | None, ...]]
) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:2])
    return (*backward(dy, *ctx.saved_tensors, *ctx.options, needs), None, None, None)


@torch.library.custom_op("lmkern::activation", mutates_args=())
def _activation_op(x: Tensor, bias: Tensor | None, function: str, gated: bool, backend: str | None) -> Tensor:
    return _forward(x, bias, function, gated, backend)


@_activation_op.register_fake
def _(x: Tensor, bias: Tensor | None, function: str, gated: bool, backend: str | None) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // 2 if gated else x.shape[1])


@torch.library.custom_op("lmkern::activation_backward", mutates_args=())
def _activation_backward_op(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    function: str,
    gated: bool,
    backend: str | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    return as_tensors(_backward(dy, x, bias, function, gated, backend, needs), x)  # type: ignore[return-value]


@_activation_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    function: str,
    gated: bool,
    backend: str | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    return fake_gradients((x, bias), needs, x)  # type: ignore[return-value]


def _registered_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    # Through the registered backward, which has no derivative of its own and says so to a double backward.
    def backward(*arguments: Any) -> tuple[Tensor | None, ...]:
        return as_optional(call_registered("activation_backward", *arguments), arguments[-1])

    return _gradients(ctx, dy, backward)


register_gradients("activation", _registered_gradients, _setup_context)


def _wide(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(statistics_dtype(bias)).contiguous()


def _check(name: str, x: Tensor, bias: Tensor | None, function: str, gated: bool) -> None:
    """ValueError in words for what no backend can make sense of."""
    if function not in FUNCTIONS:
        raise ValueError(f"{name}: function must be one of {', '.join(FUNCTIONS)}; got {function!r}")
    if not x.dim() or (gated and x.shape[-1] % 2):
        width = "an even last dimension, gate and value side by side" if gated else "at least one dimension"
        raise ValueError(f"{name}: x must have {width}; got {tuple(x.shape)}")
    check_dtype(name, "x", x.dtype)
    if bias is None:
        return
    if tuple(bias.shape) != x.shape[-1:]:
        raise ValueError(f"{name}: bias must be {tuple(x.shape[-1:])}; got {tuple(bias.shape)}")
    wider = bias.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)
    if bias.dtype != x.dtype and not wider:
        raise ValueError(
            f"{name}: bias must have x's dtype {x.dtype}, or float32 beside a 16-bit x; got {bias.dtype}"
        )
    if bias.device != x.device:
        raise ValueError(f"{name}: bias must be on x's device {x.device}; got {bias.device}")
