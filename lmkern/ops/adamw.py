"""One step of AdamW, in place."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lmkern.kernels import backends
from lmkern.kernels.statistics import statistics_dtype
from lmkern.ops.dispatch import check_dtype, dense, direct, takes_tensors


@takes_tensors
def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
    copy: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Update param and its two moments by one step of AdamW, as torch.optim.AdamW does, in one pass.

        g = grad * grad_scale
        exp_avg    += (1 - beta1) (g - exp_avg)
        exp_avg_sq  = beta2 exp_avg_sq + (1 - beta2) g^2
        param       = (1 - lr weight_decay) param
                      - lr / (1 - beta1^step) exp_avg / (sqrt(exp_avg_sq) / sqrt(1 - beta2^step) + eps)

    param: any shape, float32, float16, bfloat16 or float64, dense in memory (a permutation of a contiguous
        tensor). grad: param's shape, any strides; float32 or 16 bits beside a param of these, float64 beside
        float64.
    exp_avg, exp_avg_sq: the moments, param's shape and strides, float32 (float64 for float64), at first zero.
    step: the number of this step, from 1 on.
    grad_scale: a factor on the gradient, which gradient clipping puts here.
    copy: param's shape and strides, bfloat16: written with the new param too; or None.
    backend: "triton", "cpu" or "reference"; default the fastest that applies.

    The tensors that are written may not share memory. Not differentiable. Raises ValueError for shapes,
    strides, dtypes and numbers; UnsupportedBackend if the named backend cannot run this here.
    Loshchilov & Hutter 2019, arXiv:1711.05101.
    """
    _check(param, grad, exp_avg, exp_avg_sq, copy, beta1, beta2, step)
    for name, number in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not 0.0 <= number < float("inf"):
            raise ValueError(f"adamw_: {name} must be a finite number from 0 up; got {number}")
    scalars = (lr, beta1, beta2, eps, weight_decay, step, grad_scale)
    with torch.no_grad():
        if direct(param, grad, exp_avg, exp_avg_sq, copy):
            _step(param, grad, exp_avg, exp_avg_sq, copy, *scalars, backend)
            # Autograd sees no kernel's write: a graph that saved these before must not run backward.
            written = (param, exp_avg, exp_avg_sq)
            increment_version(written if copy is None else (*written, copy))
        else:
            torch.ops.lmkern.adamw_(param, grad, exp_avg, exp_avg_sq, copy, *scalars, backend)


def _step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
    backend: str | None,
) -> None:
    kernel = backends.select(backends.Call("adamw", {"param": param, "grad": grad}, {}, backend))
    _check_apart(param=param, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, copy=copy)
    if grad.stride() != param.stride():
        grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
    kernel.step(
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        copy,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        step=step,
        grad_scale=grad_scale,
    )


_registered = torch.library.custom_op(
    "lmkern::adamw_", _step, mutates_args=("param", "exp_avg", "exp_avg_sq", "copy")
)


@_registered.register_fake
def _(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
    backend: str | None,
) -> None:
    return None


def _check_apart(**written: Tensor | None) -> None:
    """ValueError where two tensors that are written share memory; on the meta device none has any."""
    extents = sorted(
        (x.data_ptr(), x.data_ptr() + x.numel() * x.element_size(), name)
        for name, x in written.items()
        if x is not None and x.numel() and not x.is_meta
    )
    for (_, end, one), (begin, _, other) in pairwise(extents):
        if begin < end:
            raise ValueError(f"adamw_: {one} and {other} must not share memory; both are written")


def _check(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    beta1: float,
    beta2: float,
    step: int,
) -> None:
    """ValueError in words for what no backend can make sense of."""
    check_dtype("adamw_", "param", param.dtype)
    check_dtype("adamw_", "grad", grad.dtype)
    for name, tensor in (("param", param), ("grad", grad)):
        if tensor.layout is not torch.strided:
            raise ValueError(
                f"adamw_: {name} must be strided; got {tensor.layout}. Of sparse gradients take "
                "torch.optim.SparseAdam, or layers that give dense ones (sparse=False)"
            )
    if not dense(param):
        raise ValueError(
            f"adamw_: param must be dense in memory; got {tuple(param.shape)} with strides {param.stride()}"
        )
    if grad.shape != param.shape:
        raise ValueError(f"adamw_: grad must be {tuple(param.shape)}, as param; got {tuple(grad.shape)}")
    if (grad.dtype == torch.float64) != (param.dtype == torch.float64):
        raise ValueError(
            f"adamw_: float64 grad and param go together; got grad {grad.dtype}, param {param.dtype}"
        )
    written = [
        ("exp_avg", exp_avg, statistics_dtype(param)),
        ("exp_avg_sq", exp_avg_sq, statistics_dtype(param)),
    ]
    if copy is not None:
        if param.dtype == torch.float64:
            raise ValueError(
                "adamw_: copy is bfloat16 beside a param of float32 or 16 bits; got param float64"
            )
        written.append(("copy", copy, torch.bfloat16))
    for name, tensor, dtype in written:
        if tensor.shape != param.shape or tensor.stride() != param.stride() or tensor.dtype != dtype:
            raise ValueError(
                f"adamw_: {name} must be {tuple(param.shape)} {dtype} with param's strides {param.stride()}; "
                f"got {tuple(tensor.shape)} {tensor.dtype} with {tensor.stride()}"
            )
    for name, tensor in (("grad", grad), *((name, tensor) for name, tensor, _ in written)):
        if tensor.device != param.device:
            raise ValueError(f"adamw_: {name} must be on param's device {param.device}; got {tensor.device}")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and step >= 1):
        raise ValueError(
            f"adamw_: betas must be in [0, 1) and step at least 1; got {beta1}, {beta2}, step {step}"
        )
