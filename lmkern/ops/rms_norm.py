"""RMS norm as a differentiable function."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lmkern.kernels import backends
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
from lmkern.ops.registration import call_registered, register_gradients

Gradients = tuple[Tensor | None, ...]


@takes_tensors
def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    offset: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """torch.nn.functional.rms_norm, argument for argument, on lmkern's kernels.

    y = x / sqrt(mean(x^2) + eps) * (offset + weight) over the last len(normalized_shape) dimensions.

    input: (*, *normalized_shape), float32, float16, bfloat16 or float64, any strides.
    weight: normalized_shape, in input's dtype, or float32 beside a 16-bit input; None: no factor at all.
    eps: default the spacing of numbers at 1 in the dtype of the sums: float32's, float64's for float64.
    offset: 1 where weights are stored as their distance from one (Gemma).
    backend: "cuda", "triton", "cpu" or "reference"; default the fastest that applies.

    Returns input's shape and dtype, contiguous. The mean square and the sum of the weight's gradient are
    float32 (float64 for float64). Raises ValueError for shapes, dtypes and devices; UnsupportedBackend if the
    named backend cannot run this here. Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    shape = as_shape(normalized_shape)
    check_input("rms_norm", input, shape)
    check_beside("rms_norm", "weight", weight, shape, input)
    if eps is None:
        eps = torch.finfo(statistics_dtype(input)).eps
    x, weight = as_matrix(input, shape), as_vector(weight)
    if not direct(x, weight):
        y = call_registered("rms_norm", x, weight, eps, offset, backend)[0]
    elif wants_gradient(x, weight):
        y = _RMSNorm.apply(x, weight, eps, offset, backend)
    else:
        y = _forward(_kernel(x, weight, backend), x, weight, eps, offset)[0]
    return y if x is input else y.view(input.shape)  # type: ignore[no-any-return]


def _kernel(x: Tensor, weight: Tensor | None, backend: str | None) -> ModuleType:
    return backends.select(backends.Call("rms_norm", {"x": x, "weight": weight}, {}, backend))


def _forward(
    kernel: ModuleType, x: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    return kernel.forward(rows(x), parameters(weight, None)[0], eps=eps, offset=offset)  # type: ignore[no-any-return]


def _backward(
    kernel: ModuleType,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    needs: Sequence[bool],
) -> Gradients:
    dx, dweight = kernel.backward(
        rows(dy), rows(x), parameters(weight, None)[0], rstd, offset=offset, needs=tuple(needs)
    )
    return dx, to_dtype_of(dweight, weight)


class _RMSNorm(torch.autograd.Function):
    """The direct path: the registered op below without the dispatcher in between."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float, offset: float, backend: str | None
    ) -> Tensor:
        ctx.kernel, ctx.offset = _kernel(x, weight, backend), offset
        y, rstd = _forward(ctx.kernel, x, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable("rms_norm")
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, weight, rstd = ctx.saved_tensors
        gradients = _backward(ctx.kernel, dy, x, weight, rstd, ctx.offset, ctx.needs_input_grad[:2])
        return (*gradients, None, None, None)


@torch.library.custom_op("lmkern::rms_norm", mutates_args=())
def _rms_norm_op(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    return _forward(_kernel(x, weight, backend), x, weight, eps, offset)


@_rms_norm_op.register_fake
def _(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:1], dtype=statistics_dtype(x))


@torch.library.custom_op("lmkern::rms_norm_backward", mutates_args=())
def _rms_norm_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    backend: str | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    gradients = _backward(_kernel(x, weight, backend), dy, x, weight, rstd, offset, needs)
    # A registered op returns tensors only; a gradient nobody asked for is an empty one.
    return as_tensors(gradients, x)  # type: ignore[return-value]


@_rms_norm_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    backend: str | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    return fake_gradients((x, weight), needs, x)  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.offset, ctx.backend = inputs
    ctx.save_for_backward(x, weight, output[1])


def _registered_gradients(ctx: Any, dy: Tensor, *_statistics: Tensor | None) -> Gradients:
    # Through the registered backward, which has no derivative of its own and says so to a double backward.
    needs = list(ctx.needs_input_grad[:2])
    gradients = call_registered("rms_norm_backward", dy, *ctx.saved_tensors, ctx.offset, ctx.backend, needs)
    return (*as_optional(gradients, needs), None, None, None)


register_gradients("rms_norm", _registered_gradients, _setup_context)
