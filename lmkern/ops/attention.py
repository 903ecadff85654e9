"""Scaled dot-product attention as a differentiable function."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmkern.kernels import backends
from lmkern.kernels.attention import reference
from lmkern.ops.dispatch import autocast, direct, statistics_dtype

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q @ k^T * softmax_scale) @ v, never materialising the scores.

    q: (B, H, N_q, D); k, v: (B, H_kv, N_k, D) with H a multiple of H_kv. float32, float16, bfloat16 or
        float64, one device, any strides.
    softmax_scale: default 1 / sqrt(D).
    causal: query i sees keys j <= i + N_k - N_q (the last query sees every key).
    return_lse: also return the log-sum-exp of each query's scores, (B, H, N_q), differentiable.
    backend: "triton", "cpu" or "reference"; default the fastest that applies.

    Returns (B, H, N_q, D) in q's dtype, laid out as q is. A query with no visible key gives zeros (lse -inf)
    and zero gradients. Under autocast q, k and v are taken in its dtype. Raises ValueError for shapes, dtypes
    and devices; UnsupportedBackend if the named backend cannot run this here.

    Vaswani et al. 2017, arXiv:1706.03762; online softmax as in Dao et al. 2022, arXiv:2205.14135.
    """
    _check("attention", q, k, v)
    q, k, v = _cast("attention", q, k, v)
    diagonal = k.shape[2] - q.shape[2] if causal else None
    out, lse = _attention(q, k, v, diagonal, softmax_scale, backend)
    return (out, lse) if return_lse else out


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, argument for argument, on lmkern's kernels.

    is_causal is torch's: query i sees keys j <= i, counted from the first query and the first key
    (`attention` counts from the last). attn_mask and dropout_p are served by the reference until the kernels
    take them. A query that sees no key gives zeros, with every kind of mask.
    """
    name = "scaled_dot_product_attention"
    if attn_mask is not None and is_causal:
        raise ValueError(f"{name}: give attn_mask or is_causal=True, not both; got both")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{name}: dropout_p must lie in [0, 1]; got {dropout_p}")
    if query.dim() < 2 or key.dim() != query.dim() or value.dim() != query.dim():
        raise ValueError(
            f"{name}: query, key and value must be (..., N, D) of equal rank; "
            f"got {_shapes(query, key, value)}"
        )
    lead = query.shape[:-2]
    q, k, v = (_four_dimensional(x) for x in (query, key, value))
    if attn_mask is None and dropout_p == 0.0 and v.shape[-1] == q.shape[-1]:
        _check(name, q, k, v, grouped=enable_gqa)
        q, k, v = _cast(name, q, k, v)
        out, _ = _attention(q, k, v, 0 if is_causal else None, scale, None)
    else:
        _check(name, q, k, v, grouped=enable_gqa, same_width=False)
        q, k, v = _cast(name, q, k, v)
        out, _ = reference.attention(
            q,
            k,
            v,
            diagonal=0 if is_causal else None,
            softmax_scale=_scale(q, scale),
            mask=_checked_mask(name, attn_mask, query, key),
            dropout_p=dropout_p,
        )
    return out.reshape(*lead, *out.shape[-2:])


def _attention(
    q: Tensor, k: Tensor, v: Tensor, diagonal: int | None, softmax_scale: float | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    scale = _scale(q, softmax_scale)
    if direct(q, k, v):
        return _Attention.apply(q, k, v, diagonal, scale, backend)  # type: ignore[no-any-return]
    return torch.ops.lmkern.attention(q, k, v, diagonal, scale, backend)  # type: ignore[no-any-return]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, diagonal: int | None, softmax_scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    options = {"diagonal": diagonal, "softmax_scale": softmax_scale}
    kernel = backends.select(backends.Call("attention", {"q": q, "k": k, "v": v}, options, backend))
    return kernel.forward(q, k, v, **options)  # type: ignore[no-any-return]


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    diagonal: int | None,
    softmax_scale: float,
    backend: str | None,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    options = {"diagonal": diagonal, "softmax_scale": softmax_scale}
    kernel = backends.select(backends.Call("attention", {"q": q, "k": k, "v": v}, options, backend))
    gradients = kernel.backward(dout, q, k, v, out, lse, dlse, **options, needs=tuple(needs))
    return gradients  # type: ignore[no-any-return]


class _Attention(torch.autograd.Function):
    """The direct path: the registered op below without the dispatcher in between."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        diagonal: int | None,
        softmax_scale: float,
        backend: str | None,
    ) -> tuple[Tensor, Tensor]:
        output = _forward(q, k, v, diagonal, softmax_scale, backend)
        ctx.set_materialize_grads(False)
        _setup_context(ctx, (q, k, v, diagonal, softmax_scale, backend), output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dout, dlse, _backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.diagonal, ctx.softmax_scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output)


def _gradients(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, backward: Callable[..., tuple[Tensor | None, ...]]
) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    needs = list(ctx.needs_input_grad[:3])
    gradients = backward(dout, q, k, v, out, lse, dlse, ctx.diagonal, ctx.softmax_scale, ctx.backend, needs)
    return (*gradients, None, None, None)


def _registered_backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    needs = arguments[-1]
    gradients = torch.ops.lmkern.attention_backward(*arguments)
    return tuple(gradient if need else None for gradient, need in zip(gradients, needs, strict=True))


@torch.library.custom_op("lmkern::attention", mutates_args=())
def _attention_op(
    q: Tensor, k: Tensor, v: Tensor, diagonal: int | None, softmax_scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, diagonal, softmax_scale, backend)


@_attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, diagonal: int | None, softmax_scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=statistics_dtype(q))


@torch.library.custom_op("lmkern::attention_backward", mutates_args=())
def _attention_backward_op(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    diagonal: int | None,
    softmax_scale: float,
    backend: str | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _backward(dout, q, k, v, out, lse, dlse, diagonal, softmax_scale, backend, needs)
    # A registered op returns tensors only; a gradient nobody asked for is an empty one.
    return tuple(q.new_empty(0) if gradient is None else gradient for gradient in gradients)  # type: ignore[return-value]


@_attention_backward_op.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    diagonal: int | None,
    softmax_scale: float,
    backend: str | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = zip((q, k, v), needs, strict=True)
    return tuple(torch.empty_like(x) if need else q.new_empty(0) for x, need in wanted)  # type: ignore[return-value]


def _registered_gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    # Through the registered backward, which has no derivative of its own and says so to a double backward.
    return _gradients(ctx, dout, dlse, _registered_backward)


torch.library.register_autograd("lmkern::attention", _registered_gradients, setup_context=_setup_context)


def _scale(q: Tensor, softmax_scale: float | None) -> float:
    return 1.0 / math.sqrt(max(q.shape[-1], 1)) if softmax_scale is None else float(softmax_scale)


def _check(
    name: str, q: Tensor, k: Tensor, v: Tensor, *, grouped: bool = True, same_width: bool = True
) -> None:
    """ValueError in words for what no backend can make sense of."""

    def fail(what: str, got: str) -> None:
        raise ValueError(f"{name}: {what}; got {got}")

    if not (q.dim() == k.dim() == v.dim() == 4):
        fail("q, k and v must be (B, H, N, D)", _shapes(q, k, v))
    if not (q.device == k.device == v.device):
        fail("q, k and v must be on one device; move them with .to()", f"{q.device}, {k.device}, {v.device}")
    if q.shape[3] != k.shape[3] or q.shape[3] < 1 or (same_width and v.shape[3] != q.shape[3]):
        fail("q, k and v must share head_dim", _shapes(q, k, v))
    if not (q.shape[0] == k.shape[0] == v.shape[0]):
        fail("q, k and v must share the batch size", _shapes(q, k, v))
    if k.shape[1:3] != v.shape[1:3]:
        fail("k and v must share heads and length", _shapes(q, k, v))
    if q.shape[1] != k.shape[1] and (not grouped or k.shape[1] == 0 or q.shape[1] % k.shape[1]):
        rule = "the number of query heads must be a multiple of the key/value heads"
        fail(
            rule if grouped else "q and k must share the number of heads unless enable_gqa=True",
            _shapes(q, k, v),
        )


def _cast(name: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in the dtype to compute in: autocast's, or the one they share. ValueError without one."""
    q, k, v = autocast(q, k, v)
    if q.dtype not in DTYPES or not (q.dtype == k.dtype == v.dtype):
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(
            f"{name}: q, k and v must share one dtype of {dtypes}; cast them first; "
            f"got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    return q, k, v


def _checked_mask(name: str, mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask, made to broadcast against (B, H, N_q, N_k)."""
    if mask is None:
        return None
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise ValueError(
            f"{name}: attn_mask must be boolean (True: seen) or floating (added); got {mask.dtype}"
        )
    scores = (*query.shape[:-1], key.shape[-2])
    try:
        fits = torch.broadcast_shapes(mask.shape, scores) == torch.Size(scores)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"{name}: attn_mask must broadcast to {scores}; got {tuple(mask.shape)}")
    if mask.dtype == torch.float64 and query.dtype != torch.float64:
        raise ValueError(
            f"{name}: attn_mask must be boolean or no wider than query; got {mask.dtype} and {query.dtype}"
        )
    return mask if query.dim() <= 4 else mask.broadcast_to(scores).flatten(0, -4)


def _four_dimensional(x: Tensor) -> Tensor:
    """(..., N, D) as (B, H, N, D): a view where the leading dimensions allow it."""
    if x.dim() == 4:
        return x
    if x.dim() < 4:
        return x[(None,) * (4 - x.dim())]
    return x.flatten(0, -4)


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
