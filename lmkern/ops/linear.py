"""A linear map for which we have what torch lacks on a CPU: few rows, and products of 16 bits anywhere."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from lmkern.kernels import backends
from lmkern.kernels.cpu_call import torch_multiplies
from lmkern.kernels.linear import MOST_ROWS
from lmkern.ops.dispatch import autocast, eager, rows, takes_tensors, wants_gradient
from lmkern.ops.plain_gradients import plain_gradients


@takes_tensors
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """x @ weight^T + bias, as torch.nn.functional.linear, of which it is a drop-in.

    x: (..., K). weight: (N, K). bias: (N,) or None.
    backend: "cpu" or "reference"; default the fastest that applies.

    A few rows on a CPU, in eager mode and where no gradient is wanted, as in generation, take a kernel that
    reads the weight once at the speed of memory; it gives a row the same bits whatever rows stand beside it
    and whatever the number of threads. Where the CPU has no instructions for products of bfloat16 (float16),
    those are computed in float32, forward and backward, in eager mode and under autocast. All else is torch's
    own product, with its autograd and transforms, and its errors in words of torch.

    Returns (..., N). Raises UnsupportedBackend where "cpu" is named and cannot run this call.
    """
    if backend is None and torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if backend is None and x.is_cpu and _narrowed(x):
        x, weight, *others = autocast(x, weight, *(() if bias is None else (bias,)))
        with torch.autocast("cpu", enabled=False):
            return linear(x, weight, *others)
    gradient = wants_gradient(x, weight, bias)
    if backend is None and x.dtype.itemsize > 2 and (gradient or _many_rows(x)):
        return F.linear(x, weight, bias)
    plain = _plain(x, weight, bias)
    if backend is None and not plain:
        return F.linear(x, weight, bias)
    if backend == "cpu" and not plain:
        raise backends.UnsupportedBackend(
            "linear: backend 'cpu' takes CPU tensors of one dtype that fit together, the weight's rows "
            "contiguous, outside of autocast, compilers and transforms; leave backend out; "
            f"got x {tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)} {weight.dtype}. Here: reference"
        )
    tensors = {"x": x, "weight": weight, "bias": bias}
    kernel = backends.select(backends.Call("linear", tensors, {"gradient": gradient}, backend))
    if not gradient and x.is_contiguous():
        return kernel.forward(x, weight, bias)  # type: ignore[no-any-return]
    flat = rows(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))
    if gradient and hasattr(kernel, "backward"):
        y = _Linear.apply(flat, weight, bias, kernel)
    else:
        y = kernel.forward(flat, weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    """The product of a kernel that brings its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kernel: ModuleType) -> Tensor:
        ctx.kernel = kernel
        ctx.save_for_backward(x, weight)
        return kernel.forward(x, weight, bias)  # type: ignore[no-any-return]

    @staticmethod
    @plain_gradients
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            # To be differentiated once more, which torch's own products can be.
            gradients = (dy @ weight, dy.T @ x, dy.sum(0))
        else:
            gradients = ctx.kernel.backward(dy, x, weight, needs=needs)
        return *(each if need else None for each, need in zip(gradients, needs, strict=True)), None


def _many_rows(x: Tensor) -> bool:
    return x.dim() == 0 or x.numel() > MOST_ROWS.get(x.dtype, 0) * x.shape[-1]


def _narrowed(x: Tensor) -> bool:
    """Whether autocast takes x to a dtype of which this CPU has no product."""
    if not torch.is_autocast_enabled("cpu") or x.dtype == torch.float64:
        return False
    return not torch_multiplies(torch.get_autocast_dtype("cpu"))


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a kernel may be asked at all: tensors that fit together, outside of everything that torch
    would have to see."""
    if forward_ad._current_level >= 0 or not eager(x, weight, bias) or torch.is_autocast_enabled("cpu"):
        return False
    dtype, shape = weight.dtype, weight.shape
    if not (x.is_cpu and weight.is_cpu and x.dtype == dtype and len(shape) == 2 and x.dim()):
        return False
    N, K = shape
    if x.shape[-1] != K or (K > 1 and weight.stride(1) != 1):
        return False
    return bias is None or (
        bias.is_cpu and bias.dtype == dtype and bias.shape == (N,) and bias.is_contiguous()
    )
