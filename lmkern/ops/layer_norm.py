"""Layer norm as a differentiable function."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lmkern.kernels import backends
from lmkern.kernels.layer_norm import reference
from lmkern.kernels.statistics import statistics_dtype
from lmkern.ops.dispatch import (
    as_optional,
    as_tensors,
    direct,
    fake_gradients,
    rows,
    takes_tensors,
    wants_gradient,
)
from lmkern.ops.norm_arguments import (
    as_matrix,
    as_shape,
    as_vector,
    check_beside,
    check_input,
    parameters,
    to_dtype_of,
)
from lmkern.ops.once_differentiable import once_differentiable
from lmkern.ops.plain_gradients import plain_gradients
from lmkern.ops.registration import call_registered, register_gradients
from lmkern.ops.vjp import leaf, vjp

Gradients = tuple[Tensor | None, ...]


@takes_tensors
def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """torch.nn.functional.layer_norm, argument for argument, on lmkern's kernels.

    y = (x - mean) / sqrt(var + eps) * weight + bias over the last len(normalized_shape) dimensions.

    input: (*, *normalized_shape), float32, float16, bfloat16 or float64, any strides.
    weight, bias: normalized_shape, in input's dtype, or float32 beside a 16-bit input; either may be None.
    backend: "cuda", "triton", "cpu" or "reference"; default the fastest that applies.

    Returns input's shape and dtype, contiguous. Mean, variance and the sums of the gradients of weight and
    bias are float32 (float64 for float64). Raises ValueError for shapes, dtypes and devices;
    UnsupportedBackend if the named backend cannot run this here. In eager mode gradients are differentiable
    once more, by the reference's formula. Ba et al. 2016, arXiv:1607.06450.
    """
    shape = as_shape(normalized_shape)
    check_input("layer_norm", input, shape)
    check_beside("layer_norm", "weight", weight, shape, input)
    check_beside("layer_norm", "bias", bias, shape, input)
    x, weight, bias = as_matrix(input, shape), as_vector(weight), as_vector(bias)
    if not direct(x, weight, bias):
        y = call_registered("layer_norm", x, weight, bias, eps, backend)[0]
    elif wants_gradient(x, weight, bias):
        y = _LayerNorm.apply(x, weight, bias, eps, backend)
    else:
        y = _forward(_kernel(x, weight, bias, backend), x, weight, bias, eps)[0]
    return y if x is input else y.view(input.shape)  # type: ignore[no-any-return]


def _kernel(x: Tensor, weight: Tensor | None, bias: Tensor | None, backend: str | None) -> ModuleType:
    tensors = {"x": x, "weight": weight, "bias": bias}
    return backends.select(backends.Call("layer_norm", tensors, {}, backend))


def _forward(
    kernel: ModuleType, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return kernel.forward(rows(x), *parameters(weight, bias), eps=eps)  # type: ignore[no-any-return]


def _backward(
    kernel: ModuleType,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    needs: Sequence[bool],
) -> Gradients:
    dx, dweight, dbias = kernel.backward(
        rows(dy), rows(x), parameters(weight, bias)[0], mean, rstd, needs=tuple(needs)
    )
    return dx, to_dtype_of(dweight, weight), to_dtype_of(dbias, bias)


class _LayerNorm(torch.autograd.Function):
    """The direct path: the registered op below without the dispatcher in between."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str | None
    ) -> Tensor:
        ctx.kernel, ctx.eps = _kernel(x, weight, bias, backend), eps
        y, mean, rstd = _forward(ctx.kernel, x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    @plain_gradients
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        # Gradients are on in here where the caller asked for a graph of them, and nowhere else.
        backward = _Backward.apply if torch.is_grad_enabled() else _backward
        x, weight, bias, mean, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        gradients = backward(ctx.kernel, dy, x, weight, bias, mean, rstd, ctx.eps, needs)
        return (*gradients, None, None)


class _Backward(torch.autograd.Function):
    """The kernel's backward pass as something to differentiate: by the reference's formula, once."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Gradients:
        _, dy, x, weight, bias, _, _, ctx.eps, _ = arguments
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x, weight, bias)
        return _backward(*arguments)

    @staticmethod
    @once_differentiable("layer_norm's backward")
    def backward(ctx: Any, *directions: Tensor | None) -> Gradients:
        dy, x, weight, bias = (leaf(t) for t in ctx.saved_tensors)
        inputs = (x, weight, bias)
        with torch.enable_grad():
            y = reference.forward(x, weight, bias, eps=ctx.eps)[0]
            first = vjp((y,), (dy,), inputs)
            ddy, *others = vjp(first, directions, (dy, *inputs))
        return (None, ddy, *others, *(None,) * 4)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])


@torch.library.custom_op("lmkern::layer_norm", mutates_args=())
def _layer_norm_op(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(_kernel(x, weight, bias, backend), x, weight, bias, eps)


@_layer_norm_op.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.shape[:1], dtype=statistics_dtype(x))
    return x.new_empty(x.shape), statistics, torch.empty_like(statistics)


@torch.library.custom_op("lmkern::layer_norm_backward", mutates_args=())
def _layer_norm_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    backend: str | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = _kernel(x, weight, bias, backend)
    gradients = _backward(kernel, dy, x, weight, bias, mean, rstd, 0.0, needs)
    # A registered op returns tensors only; a gradient nobody asked for is an empty one.
    return as_tensors(gradients, x)  # type: ignore[return-value]


@_layer_norm_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    backend: str | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients((x, weight, bias), needs, x)  # type: ignore[return-value]


def _registered_gradients(ctx: Any, dy: Tensor, *_statistics: Tensor | None) -> Gradients:
    # Through the registered backward, which has no derivative of its own and says so to a double backward.
    needs = list(ctx.needs_input_grad[:3])
    gradients = call_registered("layer_norm_backward", dy, *ctx.saved_tensors, ctx.backend, needs)
    return (*as_optional(gradients, needs), None, None)


register_gradients("layer_norm", _registered_gradients, _setup_context)
