"""Layer norm as a differentiable function."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lmkern.kernels import backends
from lmkern.ops.dispatch import direct, statistics_dtype

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
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
    UnsupportedBackend if the named backend cannot run this here. Ba et al. 2016, arXiv:1607.06450.
    """
    shape = tuple(normalized_shape)
    _check(input, shape, weight, bias)
    x = input.reshape(math.prod(input.shape[: -len(shape)]), math.prod(shape))  # (R, E)
    flat_weight = None if weight is None else weight.reshape(-1)
    flat_bias = None if bias is None else bias.reshape(-1)
    if direct(x, flat_weight, flat_bias):
        y = _LayerNorm.apply(x, flat_weight, flat_bias, eps, backend)
    else:
        y = torch.ops.lmkern.layer_norm(x, flat_weight, flat_bias, eps, backend)[0]
    return y.view(input.shape)  # type: ignore[no-any-return]


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = backends.select(
        backends.Call("layer_norm", {"x": x, "weight": weight, "bias": bias}, {}, backend)
    )
    return kernel.forward(_rows(x), *_parameters(weight, bias), eps=eps)  # type: ignore[no-any-return]


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    backend: str | None,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    kernel = backends.select(
        backends.Call("layer_norm", {"x": x, "weight": weight, "bias": bias}, {}, backend)
    )
    dx, dweight, dbias = kernel.backward(
        _rows(dy), _rows(x), _parameters(weight, bias)[0], mean, rstd, needs=tuple(needs)
    )
    if dweight is not None and weight is not None:
        dweight = dweight.to(weight.dtype)
    if dbias is not None and bias is not None:
        dbias = dbias.to(bias.dtype)
    return dx, dweight, dbias


class _LayerNorm(torch.autograd.Function):
    """The direct path: the registered op below without the dispatcher in between."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str | None
    ) -> Tensor:
        output = _forward(x, weight, bias, eps, backend)
        _setup_context(ctx, (x, weight, bias, eps, backend), output)
        return output[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dy, _backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])


def _gradients(
    ctx: Any, dy: Tensor, backward: Callable[..., tuple[Tensor | None, ...]]
) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    return (*backward(dy, x, weight, bias, mean, rstd, ctx.backend, needs), None, None)


def _registered_backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    needs = arguments[-1]
    gradients = torch.ops.lmkern.layer_norm_backward(*arguments)
    return tuple(gradient if need else None for gradient, need in zip(gradients, needs, strict=True))


@torch.library.custom_op("lmkern::layer_norm", mutates_args=())
def _layer_norm_op(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, weight, bias, eps, backend)


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
    gradients = _backward(dy, x, weight, bias, mean, rstd, backend, needs)
    # A registered op returns tensors only; a gradient nobody asked for is an empty one.
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)  # type: ignore[return-value]


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
    wanted = zip((x, weight, bias), needs, strict=True)
    return tuple(t.new_empty(t.shape) if need and t is not None else x.new_empty(0) for t, need in wanted)  # type: ignore[return-value]


def _registered_gradients(ctx: Any, dy: Tensor, *_statistics: Tensor | None) -> tuple[Tensor | None, ...]:
    # Through the registered backward, which has no derivative of its own and says so to a double backward.
    return _gradients(ctx, dy, _registered_backward)


torch.library.register_autograd("lmkern::layer_norm", _registered_gradients, setup_context=_setup_context)


def _rows(x: Tensor) -> Tensor:
    """x with the elements of a row next to each other, as the kernels read it."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _parameters(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """weight and bias contiguous and of one dtype, the wider of the two."""
    if weight is None or bias is None or weight.dtype == bias.dtype:
        return _contiguous(weight), _contiguous(bias)
    dtype = torch.promote_types(weight.dtype, bias.dtype)
    return weight.to(dtype).contiguous(), bias.to(dtype).contiguous()


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _check(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None) -> None:
    """ValueError in words for what no backend can make sense of."""
    if not shape or x.dim() < len(shape) or tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(f"layer_norm: input must end in normalized_shape {shape}; got {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"layer_norm: input must be one of {dtypes}; got {x.dtype}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if tuple(parameter.shape) != shape:
            raise ValueError(f"layer_norm: {name} must be {shape}; got {tuple(parameter.shape)}")
        wider = parameter.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)
        if parameter.dtype != x.dtype and not wider:
            raise ValueError(
                f"layer_norm: {name} must have input's dtype {x.dtype}, or float32 beside a 16-bit input; "
                f"got {parameter.dtype}"
            )
        if parameter.device != x.device:
            raise ValueError(
                f"layer_norm: {name} must be on input's device {x.device}; got {parameter.device}"
            )
