"""Dropout, the addition of a residual and a norm as one differentiable function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lmkern.kernels import backends, philox
from lmkern.kernels.add_norm import Options
from lmkern.kernels.statistics import statistics_dtype
from lmkern.ops.dispatch import (
    as_optional,
    as_tensors,
    check_dtype,
    direct,
    fake_gradients,
    rows,
    takes_tensors,
    wants_gradient,
)
from lmkern.ops.norm_arguments import check_beside, parameters, to_dtype_of
from lmkern.ops.once_differentiable import once_differentiable
from lmkern.ops.registration import call_registered, register_gradients

Gradients = tuple[Tensor | None, ...]

NORMS = ("layer", "rms")


@takes_tensors
def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    norm: str = "layer",
    offset: float = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y and h, with h = residual + dropout(x) and y = norm(h): the seam of two pre-norm blocks in one pass.

    x: (*, E), what a branch gives; float32, float16, bfloat16 or float64, any strides.
    residual: x's shape; x's dtype, or float32 beside a 16-bit x.
    weight, bias: (E,), in x's dtype, or float32 beside a 16-bit x; either may be None.
    norm: "layer", layer norm over the last dimension; or "rms", RMS norm, which has no bias.
    offset: is added to weight; 1 where weights are stored as their distance from one.
    dropout_p: probability of dropping an element of x, rounded to a multiple of 1 / 65536; what is kept is
        multiplied by 1 / (1 - dropout_p). Zero outside training: there is no mode here.
    dropout_seed: () int64 on x's device, the same mask for the same seed on every backend; default one from
        torch's generator.
    backend: "cuda", "triton", "cpu" or "reference"; default the fastest that applies.

    Returns y in x's dtype and h in residual's, both of x's shape and contiguous; y is the norm of h as it is
    stored. Statistics and the sums of the gradients of weight and bias are float32 (float64 for float64).
    Raises ValueError for arguments that do not fit, UnsupportedBackend if the named backend cannot run this
    here.
    """
    seed = _check(x, residual, weight, bias, norm, dropout_p, dropout_seed)
    if seed is None:
        dropout_p = 0.0
    shape = x.shape
    if x.dim() != 2:
        x, residual = (t.reshape(math.prod(shape[:-1]), shape[-1]) for t in (x, residual))  # (R, E)
    options = (norm == "layer", eps, offset, dropout_p, seed)
    if not direct(x, residual, weight, bias, seed):
        y, h = call_registered("add_norm", x, residual, weight, bias, *options, backend)[:2]
    elif wants_gradient(x, residual, weight, bias):
        y, h = _AddNorm.apply(x, residual, weight, bias, *options, backend)
    else:
        kernel = _kernel(x, residual, weight, bias, backend)
        y, h = _forward(kernel, x, residual, weight, bias, Options(*options))[:2]
    return y.view(shape), h.view(shape)


def _kernel(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, backend: str | None
) -> ModuleType:
    tensors = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    return backends.select(backends.Call("add_norm", tensors, {}, backend))


def _forward(
    kernel: ModuleType,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    return kernel.forward(rows(x), rows(residual), *parameters(weight, bias), options)  # type: ignore[no-any-return]


def _backward(
    kernel: ModuleType,
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    options: Options,
    needs: Sequence[bool],
) -> Gradients:
    dx, dresidual, dweight, dbias = kernel.backward(
        rows(dy),
        None if dh is None else rows(dh),
        h,
        parameters(weight, bias)[0],
        mean,
        rstd,
        options,
        needs=tuple(needs),
    )
    return dx, dresidual, to_dtype_of(dweight, weight), to_dtype_of(dbias, bias)


class _AddNorm(torch.autograd.Function):
    """The direct path: the registered op below without the dispatcher in between."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        centred: bool,
        eps: float,
        offset: float,
        dropout_p: float,
        seed: Tensor | None,
        backend: str | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.kernel = _kernel(x, residual, weight, bias, backend)
        ctx.options = Options(centred, eps, offset, dropout_p)
        ctx.dtype = x.dtype
        ctx.set_materialize_grads(False)
        options = replace(ctx.options, seed=seed)
        y, h, mean, rstd = _forward(ctx.kernel, x, residual, weight, bias, options)
        ctx.save_for_backward(h, weight, bias, mean, rstd, seed)
        return y, h

    @staticmethod
    @once_differentiable("add_norm")
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> Gradients:
        h, weight, bias, mean, rstd, seed = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(h, dtype=ctx.dtype)
        options, needs = replace(ctx.options, seed=seed), ctx.needs_input_grad[:4]
        gradients = _backward(ctx.kernel, dy, dh, h, weight, bias, mean, rstd, options, needs)
        return (*gradients, *(None,) * 6)


_OPTIONS = "bool centred, float eps, float offset, float dropout_p, Tensor? seed, str? backend"


@torch.library.custom_op(
    "lmkern::add_norm",
    mutates_args=(),
    schema=f"(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, {_OPTIONS}) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
)
def _add_norm_op(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *options, backend = rest
    kernel = _kernel(x, residual, weight, bias, backend)
    y, h, mean, rstd = _forward(kernel, x, residual, weight, bias, Options(*options))
    # A registered op returns tensors only; a mean that RMS norm does not have is an empty one.
    return y, h, rstd.new_empty(0) if mean is None else mean, rstd


@_add_norm_op.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, centred: bool, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rstd = x.new_empty(x.shape[:1], dtype=statistics_dtype(x))
    mean = torch.empty_like(rstd) if centred else rstd.new_empty(0)
    return x.new_empty(x.shape), residual.new_empty(x.shape), mean, rstd


@torch.library.custom_op(
    "lmkern::add_norm_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
    f"{_OPTIONS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _add_norm_backward_op(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    mean, rstd, *fields, backend, needs = rest
    options = Options(*fields)
    kernel = _kernel(dy, h, weight, bias, backend)
    given_mean = mean if options.centred else None
    gradients = list(_backward(kernel, dy, dh, h, weight, bias, given_mean, rstd, options, needs))
    if gradients[0] is gradients[1] and gradients[0] is not None:
        # Nor may two of its results be one tensor.
        gradients[0] = gradients[0].clone()
    return as_tensors(gradients, dy)


@_add_norm_backward_op.register_fake
def _(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return fake_gradients((dy, h, weight, bias), rest[-1], dy)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, weight, bias, *ctx.scalars, seed, ctx.backend = inputs
    ctx.dtype = x.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:2], weight, bias, *output[2:], seed)


def _registered_gradients(
    ctx: Any, dy: Tensor | None, dh: Tensor | None, *_statistics: Tensor | None
) -> Gradients:
    # Through the registered backward, which has no derivative of its own and says so to a double backward.
    *saved, seed = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(saved[0], dtype=ctx.dtype)
    needs = list(ctx.needs_input_grad[:4])
    gradients = call_registered("add_norm_backward", dy, dh, *saved, *ctx.scalars, seed, ctx.backend, needs)
    return (*as_optional(gradients, needs), *(None,) * 6)


register_gradients("add_norm", _registered_gradients, _setup_context)


def _check(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor | None:
    """The seed of dropout, None without; ValueError in words for what no backend can make sense of."""
    if norm not in NORMS:
        raise ValueError(f"add_norm: norm must be 'layer' or 'rms'; got {norm!r}")
    if norm == "rms" and bias is not None:
        raise ValueError("add_norm: RMS norm has no bias; got one. Leave it out, or use norm='layer'")
    if x.dim() == 0:
        raise ValueError("add_norm: x must have a last dimension to normalize; got a tensor without any")
    check_dtype("add_norm", "x", x.dtype)
    check_beside("add_norm", "residual", residual, tuple(x.shape), x, of="x")
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_beside("add_norm", name, parameter, (x.shape[-1],), x, of="x")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"add_norm: dropout_p must lie in [0, 1]; got {dropout_p}")
    if seed is not None and (seed.dtype != torch.int64 or seed.dim() != 0 or seed.device != x.device):
        raise ValueError(
            "add_norm: dropout_seed must be an int64 tensor without dimensions on x's device "
            f"{x.device}; got {seed.dtype} {tuple(seed.shape)} on {seed.device}"
        )
    if not philox.threshold(dropout_p):
        return None
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=x.device)
    return seed
