"""Cross-entropy as a differentiable function."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmkern.kernels import backends
from lmkern.kernels.statistics import statistics_dtype
from lmkern.ops.dispatch import DTYPE_NAMES, DTYPES, direct, rows, takes_tensors, wants_gradient
from lmkern.ops.losses import check_options, check_range, check_targets, reduce
from lmkern.ops.once_differentiable import once_differentiable
from lmkern.ops.registration import call_registered, register_gradients

NAME = "cross_entropy"


@takes_tensors
def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """-log softmax(logits)[target], torch's cross_entropy with classes in the last dimension, in nats.

    logits: (..., V), float32, float16, bfloat16 or float64, any strides. targets: (...) int64 in [0, V), or
        ignore_index for a token that does not count: its logits are not read, its loss and gradient are 0.
    label_smoothing: so much of the target's weight is spread evenly over the V classes.
    z_loss: adds z_loss * lse^2 to a token's loss, lse = log sum exp of its logits: it keeps them near 0
        (Chowdhery et al. 2022, arXiv:2204.02311, section 5).
    softcap: logits become softcap * tanh(logits / softcap) first (Gemma Team 2024, arXiv:2408.00118).
    reduction: "mean" over the tokens that are not ignored, NaN where all are, as torch has it; "sum"; or
        "none" for the loss of each token.
    backend: "triton", "cpu" or "reference"; default the fastest that applies.

    Returns a scalar, or (...) for "none": float32 whatever the logits, float64 for float64. Raises ValueError
    for shapes, dtypes and options, IndexError for a target out of range (on a GPU with LMKERN_CHECKED=1; its
    loss is NaN without), UnsupportedBackend if the named backend cannot run this here.
    """
    check_options(NAME, label_smoothing, z_loss, softcap, reduction)
    if logits.dim() < 1 or logits.dtype not in DTYPES:
        raise ValueError(
            f"{NAME}: logits must be (..., V) of {DTYPE_NAMES}; got {logits.dtype} {tuple(logits.shape)}"
        )
    check_targets(NAME, "logits", targets, logits.shape[:-1], logits.device)
    rows, flat_targets = logits.reshape(targets.numel(), logits.shape[-1]), targets.reshape(-1)
    options = (ignore_index, float(label_smoothing), float(z_loss), float(softcap or 0.0))
    if not direct(logits, targets):
        loss = call_registered("cross_entropy", rows, flat_targets, *options, backend)[0]
    elif wants_gradient(logits):
        loss = _CrossEntropy.apply(rows, flat_targets, *options, backend)
    else:
        loss = _forward(rows, flat_targets, *options, backend)[0]
    loss = reduce(loss, flat_targets, ignore_index, reduction)
    return loss.view(targets.shape) if reduction == "none" else loss


def _kernel(logits: Tensor, backend: str | None) -> Any:
    return backends.select(backends.Call(NAME, {"logits": logits}, {}, backend))


def _named(ignore_index: int, label_smoothing: float, z_loss: float, softcap: float) -> dict[str, Any]:
    return {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
    }


def _forward(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_range(NAME, targets, logits.shape[1], ignore_index)
    options = _named(ignore_index, label_smoothing, z_loss, softcap)
    kernel = _kernel(logits, backend)
    return kernel.forward(rows(logits), targets.contiguous(), **options)  # type: ignore[no-any-return]


def _backward(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    backend: str | None,
) -> Tensor:
    options = _named(ignore_index, label_smoothing, z_loss, softcap)
    kernel = _kernel(logits, backend)
    return kernel.backward(dloss, rows(logits), targets.contiguous(), row_max, log_sum, **options)  # type: ignore[no-any-return]


class _CrossEntropy(torch.autograd.Function):
    """The direct path: the registered op below without the dispatcher in between."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output[0]

    @staticmethod
    @once_differentiable("cross_entropy")
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dloss, _backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, targets, *ctx.options = inputs
    ctx.save_for_backward(logits, targets, *output[1:])


def _gradients(ctx: Any, dloss: Tensor, backward: Callable[..., Tensor]) -> tuple[Tensor | None, ...]:
    return (backward(dloss, *ctx.saved_tensors, *ctx.options), *[None] * 6)


@torch.library.custom_op("lmkern::cross_entropy", mutates_args=())
def _cross_entropy_op(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(logits, targets, ignore_index, label_smoothing, z_loss, softcap, backend)


@_cross_entropy_op.register_fake
def _(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = logits.new_empty(logits.shape[:1], dtype=statistics_dtype(logits))
    return loss, torch.empty_like(loss), torch.empty_like(loss)


@torch.library.custom_op("lmkern::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward_op(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    backend: str | None,
) -> Tensor:
    options = (ignore_index, label_smoothing, z_loss, softcap)
    return _backward(dloss, logits, targets, row_max, log_sum, *options, backend)


@_cross_entropy_backward_op.register_fake
def _(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    backend: str | None,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _registered_gradients(ctx: Any, dloss: Tensor, *_statistics: Tensor | None) -> tuple[Tensor | None, ...]:
    # Through the registered backward, which has no derivative of its own and says so to a double backward.
    return _gradients(ctx, dloss, partial(call_registered, "cross_entropy_backward"))


register_gradients("cross_entropy", _registered_gradients, _setup_context)
