"""Copies into another dtype, the transposed order, or both, as differentiable functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmkern.kernels import backends
from lmkern.ops.dispatch import check_dtype, direct, takes_tensors, wants_gradient
from lmkern.ops.plain_gradients import plain_gradients
from lmkern.ops.registration import call_registered, register_gradients


@takes_tensors
def cast(x: Tensor, dtype: torch.dtype, *, backend: str | None = None) -> Tensor:
    """A copy of x in another dtype (in the same, a plain copy).

    x, dtype: float32, float16, bfloat16 or float64; x of any shape and strides.
    backend: "triton", "cpu" or "reference"; default the fastest that applies.

    Returns x's shape, with x's strides if x is dense. Rounded to the nearest, ties to even; numbers under the
    smallest normal float32 may come as zero. The gradient is the cast back, at every order. Raises ValueError
    for dtypes; UnsupportedBackend if the named backend cannot run this here.
    """
    return _copy("cast", x, dtype, False, backend)


@takes_tensors
def transposed_copy(x: Tensor, dtype: torch.dtype | None = None, *, backend: str | None = None) -> Tensor:
    """x.mT as a contiguous copy, cast to dtype on the way if one is given.

    x: (..., R, C). Returns (..., C, R), contiguous. As `cast` otherwise.
    """
    if x.dim() < 2:
        raise ValueError(f"transposed_copy: x must be (..., R, C); got {tuple(x.shape)}")
    return _copy("transposed_copy", x, x.dtype if dtype is None else dtype, True, backend)


def _copy(op: str, x: Tensor, dtype: torch.dtype, transposed: bool, backend: str | None) -> Tensor:
    check_dtype(op, "x", x.dtype)
    check_dtype(op, "dtype", dtype)
    if not direct(x):
        return call_registered("copy", x, dtype, transposed, backend)  # type: ignore[no-any-return]
    if wants_gradient(x):
        return _Copy.apply(x, dtype, transposed, backend)  # type: ignore[no-any-return]
    return _forward(x, dtype, transposed, backend)


def _forward(x: Tensor, dtype: torch.dtype, transposed: bool, backend: str | None) -> Tensor:
    kernel = backends.select(backends.Call("copy", {"x": x}, {}, backend))
    return kernel.forward(x, dtype=dtype, transposed=transposed)  # type: ignore[no-any-return]


class _Copy(torch.autograd.Function):
    """The direct path: the registered op below without the dispatcher in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, transposed: bool, backend: str | None) -> Tensor:
        _setup_context(ctx, (x, dtype, transposed, backend), x)
        return _forward(x, dtype, transposed, backend)

    @staticmethod
    @plain_gradients
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _Copy.apply(dy, *ctx.options), None, None, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, transposed, backend = inputs
    ctx.options = x.dtype, transposed, backend


@torch.library.custom_op("lmkern::copy", mutates_args=())
def _copy_op(x: Tensor, dtype: torch.dtype, transposed: bool, backend: str | None) -> Tensor:
    return _forward(x, dtype, transposed, backend)


@_copy_op.register_fake
def _(x: Tensor, dtype: torch.dtype, transposed: bool, backend: str | None) -> Tensor:
    return x.new_empty(x.mT.shape, dtype=dtype) if transposed else torch.empty_like(x, dtype=dtype)


def _registered_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return call_registered("copy", dy, *ctx.options), None, None, None


register_gradients("copy", _registered_gradients, _setup_context)
