"""Linear + cross-entropy as a differentiable function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmkern.kernels import backends
from lmkern.kernels.statistics import gradient_dtype, statistics_dtype
from lmkern.ops.dispatch import DTYPE_NAMES, DTYPES, as_optional, as_tensors, autocast, direct, takes_tensors
from lmkern.ops.losses import check_options, check_range, check_targets, reduce
from lmkern.ops.once_differentiable import once_differentiable
from lmkern.ops.registration import call_registered, register_gradients

NAME = "linear_cross_entropy"


@takes_tensors
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """The cross-entropy of x @ weight^T + bias, a language model's loss, never holding all of these logits.

    x: (..., E) float32, float16, bfloat16 or float64; weight: (V, E); bias: (V,) or None; all of one dtype,
        any strides. Under autocast they are cast as torch.nn.functional.linear casts them.
    targets: (...) int64 in [0, V), or ignore_index for a token that does not count.
    label_smoothing, z_loss, softcap, reduction: as in `lmkern.cross_entropy`.
    backend: "triton", "cpu" or "reference"; default the fastest that applies.

    The logits are made and used up a chunk of tokens at a time, and their gradient at once: for "mean" and
    "sum" the gradients of x, weight and bias are computed in the forward pass, if they will be wanted, and
    kept for backward; for "none" backward computes the logits a second time. The weight's gradient is summed
    over the tokens in float32 (float64 for float64).

    Returns a scalar, or (...) for "none": float32 whatever the dtype of x, float64 for float64. Raises
    ValueError for shapes, dtypes and options, IndexError for a target out of range (on a GPU with
    LMKERN_CHECKED=1; its loss is NaN without), UnsupportedBackend if the named backend cannot run this here.
    """
    check_options(NAME, label_smoothing, z_loss, softcap, reduction)
    _check(x, weight, bias)
    check_targets(NAME, "x", targets, x.shape[:-1], x.device)
    given = (x, weight) if bias is None else (x, weight, bias)
    x, weight, *rest = autocast(*given)
    bias = rest[0] if rest else None
    if any(tensor.dtype != x.dtype or tensor.dtype not in DTYPES for tensor in (x, weight, *rest)):
        got = ", ".join(str(tensor.dtype) for tensor in given)
        raise ValueError(
            f"{NAME}: x, weight and bias must share one dtype of {DTYPE_NAMES}; cast them first; got {got}"
        )
    rows, flat_targets = x.reshape(targets.numel(), x.shape[-1]), targets.reshape(-1)
    # What torch.jit.trace keeps must not say whether gradients were wanted as it looked.
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    early = reduction != "none" and torch.is_grad_enabled() and not tracing
    needs = [early and tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)]
    options = (ignore_index, float(label_smoothing), float(z_loss), float(softcap or 0.0), reduction)
    tensors = (rows, weight, bias, flat_targets)
    if direct(*given, targets):
        loss = _LinearCrossEntropy.apply(*tensors, *options, needs, backend)
    else:
        # Numbers: torch.jit.trace knows no list of booleans.
        loss = call_registered("linear_cross_entropy", *tensors, *options, [*map(int, needs)], backend)[0]
    return loss.view(targets.shape) if reduction == "none" else loss  # type: ignore[no-any-return]


def _kernel(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> Any:
    return backends.select(backends.Call(NAME, {"x": x, "weight": weight, "bias": bias}, {}, backend))


def _named(
    needs: list[bool], ignore_index: int, label_smoothing: float, z_loss: float, softcap: float
) -> dict[str, Any]:
    return {
        "needs": tuple(needs),
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
    }


def _shares(x: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> tuple[Tensor, Tensor]:
    """What a token's loss is multiplied by: while the gradient is computed, and afterwards.

    A float16 gradient of a mean over many tokens would vanish before the caller's loss scale could lift it;
    those that are sums over tokens come in float32.
    """
    one = x.new_ones((), dtype=statistics_dtype(x))
    if reduction != "mean":
        return one, one
    share = one / (targets != ignore_index).sum().clamp(min=1)
    return (one, share) if x.dtype == torch.float16 else (share, one)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    needs: list[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    check_range(NAME, targets, weight.shape[0], ignore_index)
    share, _ = _shares(x, targets, ignore_index, reduction)
    loss, dx, dweight, dbias = _kernel(x, weight, bias, backend).forward(
        x,
        weight,
        bias,
        targets.contiguous(),
        share.expand(targets.shape),
        **_named(needs, ignore_index, label_smoothing, z_loss, softcap),
    )
    return reduce(loss, targets, ignore_index, reduction), dx, dweight, dbias


def _backward(
    dloss: Tensor,
    gradients: Sequence[Tensor | None],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    needs: list[bool],
    backend: str | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of forward times dloss, in place; computed anew where forward left none."""
    share, later = _shares(x, targets, ignore_index, reduction)
    if any(need and gradient is None for need, gradient in zip(needs, gradients, strict=True)):
        gradients = _kernel(x, weight, bias, backend).backward(
            dloss if reduction == "none" else share.expand(targets.shape),
            x,
            weight,
            bias,
            targets.contiguous(),
            **_named(needs, ignore_index, label_smoothing, z_loss, softcap),
        )
    factor = later if reduction == "none" else dloss * later
    if factor.device.type != "cpu" or factor != 1:
        gradients = [None if gradient is None else gradient.mul_(factor) for gradient in gradients]
    return tuple(
        gradient.to(x.dtype) if need and gradient is not None else None
        for gradient, need in zip(gradients, needs, strict=True)
    )  # type: ignore[return-value]


class _LinearCrossEntropy(torch.autograd.Function):
    """The direct path: the registered op below without the dispatcher in between."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        loss, *gradients = _forward(*inputs)
        ctx.save_for_backward(*inputs[:4])
        ctx.options, ctx.backend = inputs[4:9], inputs[10]
        # They are given away by the first backward; a second one, after retain_graph, computes them anew.
        ctx.gradients = gradients
        return loss

    @staticmethod
    @once_differentiable("linear_cross_entropy")
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, [None] * 3
        needs = list(ctx.needs_input_grad[:3])
        arguments = (*ctx.saved_tensors, *ctx.options, needs, ctx.backend)
        return (*_backward(dloss, gradients, *arguments), *[None] * 8)


@torch.library.custom_op("lmkern::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    needs: list[int],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = (ignore_index, label_smoothing, z_loss, softcap, reduction)
    loss, *gradients = _forward(x, weight, bias, targets, *options, [*map(bool, needs)], backend)
    return loss, *as_tensors(gradients, x)  # type: ignore[return-value]


@_linear_cross_entropy_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    needs: list[int],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = x.new_empty(x.shape[:1] if reduction == "none" else (), dtype=statistics_dtype(x))
    return loss, *_fake_gradients(x, weight, bias, needs, gradient_dtype(x.dtype))


@torch.library.custom_op("lmkern::linear_cross_entropy_backward", mutates_args=())
def _linear_cross_entropy_backward_op(
    dloss: Tensor,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    early: list[bool],
    needs: list[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = [g.clone() if had else None for g, had in zip((dx, dweight, dbias), early, strict=True)]
    options = (ignore_index, label_smoothing, z_loss, softcap, reduction)
    gradients = _backward(dloss, kept, x, weight, bias, targets, *options, needs, backend)
    return as_tensors(gradients, x)  # type: ignore[return-value]


@_linear_cross_entropy_backward_op.register_fake
def _(
    dloss: Tensor,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    early: list[bool],
    needs: list[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(x, weight, bias, needs, x.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:], *inputs[:4])
    ctx.options, ctx.early, ctx.backend = inputs[4:9], [*map(bool, inputs[9])], inputs[10]


def _registered_gradients(ctx: Any, dloss: Tensor, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
    # Through the registered backward, which has no derivative of its own and says so to a double backward.
    needs = list(ctx.needs_input_grad[:3])
    gradients = call_registered(
        "linear_cross_entropy_backward",
        dloss,
        *ctx.saved_tensors,
        *ctx.options,
        ctx.early,
        needs,
        ctx.backend,
    )
    return (*as_optional(gradients, needs), *[None] * 8)


register_gradients("linear_cross_entropy", _registered_gradients, _setup_context)


def _fake_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[int], sums: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """sums: the dtype of dweight and dbias."""
    wanted = zip((x, weight, bias), (x.dtype, sums, sums), needs, strict=True)
    return tuple(  # type: ignore[return-value]
        x.new_empty(t.shape, dtype=dtype) if need and t is not None else x.new_empty(0)
        for t, dtype, need in wanted
    )


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """ValueError in words for what no backend can make sense of."""
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{NAME}: x must be (..., E) and weight (V, E); got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{NAME}: bias must be (V,), ({weight.shape[0]},); got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{NAME}: {name} must be on x's device {x.device}; got {tensor.device}")
