"""A linear map whose few rows, in generation, take our own kernel."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from lmkern.kernels import backends
from lmkern.ops.dispatch import direct, rows, takes_tensors, wants_gradient


@takes_tensors
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """x @ weight^T + bias, as torch.nn.functional.linear, of which it is a drop-in.

    x: (..., K). weight: (N, K). bias: (N,) or None.
    backend: "cpu" or "reference"; default the fastest that applies.

    A few rows on a CPU, in eager mode and where no gradient is wanted, as in generation, take a kernel that
    reads the weight once at the speed of memory; it gives a row the same bits whatever rows stand beside it
    and whatever the number of threads. All else is torch's own product, with its autograd, autocast and
    transforms, and its errors in words of torch.

    Returns (..., N). Raises UnsupportedBackend where "cpu" is named and cannot run this call.
    """
    ours = not wants_gradient(x, weight, bias) and _plain(x, weight, bias)
    if backend is None and not ours:
        return F.linear(x, weight, bias)
    if backend == "cpu" and not ours:
        raise backends.UnsupportedBackend(
            "linear: backend 'cpu' has no gradient and takes CPU tensors of one dtype that fit together, the "
            "weight's rows contiguous, outside of autocast, compilers and transforms; leave backend out; "
            f"got x {tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)} {weight.dtype}. Here: reference"
        )
    flat = x if backend == "reference" else rows(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))
    kernel = backends.select(
        backends.Call("linear", {"x": flat, "weight": weight, "bias": bias}, {}, backend)
    )
    y = kernel.forward(flat, weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a kernel may be asked at all: tensors that fit together, outside of everything that torch
    would have to see."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    if torch._C._are_functorch_transforms_active() or torch.is_autocast_enabled("cpu"):
        return False
    return (
        direct(x, weight, bias)
        and x.is_cpu
        and weight.is_cpu
        and x.dtype == weight.dtype
        and weight.dim() == 2
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]
        and (weight.stride(1) == 1 or weight.shape[1] < 2)
        and (bias is None or _fits(bias, weight))
    )


def _fits(bias: Tensor, weight: Tensor) -> bool:
    return (
        bias.is_cpu and bias.dtype == weight.dtype and bias.shape == weight.shape[:1] and bias.is_contiguous()
    )
