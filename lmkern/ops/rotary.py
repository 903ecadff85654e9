"""Rotary positions as a differentiable function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmkern.kernels import backends
from lmkern.kernels.checked import checked
from lmkern.kernels.rotary.layout import empty_like
from lmkern.ops.dispatch import (
    check_dtype,
    direct,
    flag,
    overlaps_itself,
    takes_tensors,
    wants_gradient,
)
from lmkern.ops.plain_gradients import plain_gradients
from lmkern.ops.registration import call_registered, register_gradients


@takes_tensors
def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    offset: int = 0,
    positions: Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Turn pairs of columns by angles that depend on the token's position.

        y1 = x1 cos - x2 sin,    y2 = x2 cos + x1 sin

    x: (B, H, N, D), float32, float16, bfloat16 or float64, any strides: what lies in memory as (B, N, H, D)
        comes as x.transpose(1, 2).
    cos, sin: (P, pairs) float32, a row for each position, 2 pairs <= D; columns from 2 pairs on stay as they
        are. They get no gradient.
    interleaved: False: x1 is columns 0 to pairs - 1 and x2 the next ones (Llama, GPT-NeoX). True: x1 is
        columns 0, 2, 4, ... and x2 columns 1, 3, 5, ... (GPT-J).
    offset: token n stands at position offset + n. positions: (B, N) int64 instead, in [0, P).
    inplace: write into x and return it.
    backend: "triton", "cpu" or "reference"; default the fastest that applies.

    Returns x's shape and dtype, heads and tokens in the order in which x has them in memory; computed in
    float32 (float64 for float64). The gradient turns back by the same angles, and so on at every order.
    Raises ValueError for shapes, dtypes and positions; UnsupportedBackend if the named backend cannot run
    this here. Su et al. 2021, arXiv:2104.09864.
    """
    interleaved = flag("rotary", "interleaved", interleaved)
    inplace = flag("rotary", "inplace", inplace)
    _check(x, cos, sin, offset, positions, inplace)
    arguments = (cos, sin, positions, offset, interleaved, False)
    if not direct(x, cos, sin, positions):
        y = call_registered("rotary", x, *arguments, backend)
        return x.copy_(y) if inplace else y
    # In place, autograd counts a version of x even where it wants no gradient.
    if inplace:
        if x.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                "rotary: inplace=True needs a tensor that may be changed here; got one made in "
                "inference_mode, outside of it. Give x.clone()"
            )
        _Rotary.apply(x, *arguments, True, backend)
        return x
    if wants_gradient(x):
        return _Rotary.apply(x, *arguments, False, backend)  # type: ignore[no-any-return]
    return _forward(x, *arguments, inplace, backend)


def _forward(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    inverse: bool,
    inplace: bool,
    backend: str | None,
) -> Tensor:
    if positions is not None:
        _check_range(positions, cos.shape[0])
        positions = positions.contiguous()
    tensors = {"x": x, "cos": cos, "sin": sin}
    kernel = backends.select(backends.Call("rotary", tensors, {}, backend))
    return kernel.forward(  # type: ignore[no-any-return]
        x,
        *_tables(cos, sin),
        positions,
        offset=offset,
        interleaved=interleaved,
        inverse=inverse,
        inplace=inplace,
    )


class _Rotary(torch.autograd.Function):
    """The direct path: the registered op below without the dispatcher in between."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        offset: int,
        interleaved: bool,
        inverse: bool,
        inplace: bool,
        backend: str | None,
    ) -> Tensor:
        y = _forward(x, cos, sin, positions, offset, interleaved, inverse, inplace, backend)
        _setup_context(ctx, (x, cos, sin, positions, offset, interleaved, inverse, backend), y)
        if inplace:
            ctx.mark_dirty(x)
        return y

    @staticmethod
    @plain_gradients
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        offset, interleaved, inverse, backend = ctx.options
        arguments = (*ctx.saved_tensors, offset, interleaved, not inverse, False, backend)
        return _Rotary.apply(dy, *arguments), *[None] * 8


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, positions, *ctx.options = inputs
    ctx.save_for_backward(cos, sin, positions)


@torch.library.custom_op("lmkern::rotary", mutates_args=())
def _rotary_op(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    inverse: bool,
    backend: str | None,
) -> Tensor:
    return _forward(x, cos, sin, positions, offset, interleaved, inverse, False, backend)


@_rotary_op.register_fake
def _(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    inverse: bool,
    backend: str | None,
) -> Tensor:
    return empty_like(x)


def _registered_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    offset, interleaved, inverse, backend = ctx.options
    arguments = (*ctx.saved_tensors, offset, interleaved, not inverse, backend)
    return call_registered("rotary", dy, *arguments), *[None] * 7


register_gradients("rotary", _registered_gradients, _setup_context)


def _tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin with the elements of a row next to each other and one row stride."""
    if cos.stride() == sin.stride() and (cos.stride(1) == 1 or cos.shape[1] <= 1):
        return cos, sin
    return cos.contiguous(), sin.contiguous()


def _check_range(positions: Tensor, count: int) -> None:
    if not positions.numel() or not checked(positions):
        return
    low, high = (int(position) for position in positions.aminmax())
    if low < 0 or high >= count:
        raise ValueError(f"rotary: positions must lie in [0, {count}), the rows of cos; got {low} to {high}")


def _check(x: Tensor, cos: Tensor, sin: Tensor, offset: int, positions: Tensor | None, inplace: bool) -> None:
    """ValueError in words for what no backend can make sense of."""
    check_dtype("rotary", "x", x.dtype)
    if x.dim() != 4:
        raise ValueError(f"rotary: x must be (B, H, N, D); got {tuple(x.shape)}")
    if cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > x.shape[3]:
        raise ValueError(
            f"rotary: cos and sin must be (positions, pairs) with 2 pairs at most D = {x.shape[3]}; "
            f"got {tuple(cos.shape)}, {tuple(sin.shape)}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32 or table.device != x.device:
            raise ValueError(
                f"rotary: {name} must be float32 on x's device {x.device}; "
                f"got {table.dtype} on {table.device}"
            )
        if table.requires_grad:
            raise ValueError(f"rotary: {name} gets no gradient here; give {name}.detach()")
    if positions is None:
        if offset < 0 or offset + x.shape[2] > cos.shape[0]:
            raise ValueError(
                f"rotary: cos and sin have {cos.shape[0]} positions; got {x.shape[2]} tokens from {offset} on"
            )
    elif positions.shape != (x.shape[0], x.shape[2]) or positions.dtype != torch.int64:
        raise ValueError(
            f"rotary: positions must be int64 (B, N) = ({x.shape[0]}, {x.shape[2]}); "
            f"got {positions.dtype} {tuple(positions.shape)}"
        )
    elif positions.device != x.device or offset:
        raise ValueError(
            f"rotary: positions come without an offset, on x's device {x.device}; "
            f"got offset {offset}, {positions.device}"
        )
    if inplace and overlaps_itself(x):
        raise ValueError(f"rotary: in place, x must not overlap itself; got strides {x.stride()}")
