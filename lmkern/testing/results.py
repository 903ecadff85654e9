"""What a call gives, forward and backward: ours and torch's, under the names of the contract."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lmkern
from lmkern.kernels.philox import keep_mask, keep_scale
from lmkern.testing import exact as long_double
from lmkern.testing.error_budget import Errors, measure
from lmkern.testing.exact import Array
from lmkern.testing.inputs import attention_inputs, attention_options, leaves
from lmkern.testing.shapes import AttentionFeatures, AttentionShape

# (q, k, v, **options) to (out, lse).
AttentionCall = Callable[..., tuple[Tensor, Tensor]]

# Of results of a call that does not ask for lse: a kernel may take a shorter way then.
ALONE = " without lse"


def attention_results(
    call: AttentionCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    dlse: Tensor | None = None,
    options: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """out, lse, dq, dk and dv of call(q, k, v, **options), and d<name> of the options' floating tensors."""
    options = dict(options or {})
    q, k, v = leaves(q, k, v)
    inputs = {"q": q, "k": k, "v": v}
    for name, option in options.items():
        if isinstance(option, Tensor) and option.is_floating_point():
            options[name] = inputs[name] = leaves(option)[0]
    out, lse = call(q, k, v, **options)
    outputs, cotangents = ((out,), (dout,)) if dlse is None else ((out, lse), (dout, dlse))
    gradients = torch.autograd.grad(outputs, list(inputs.values()), cotangents, materialize_grads=True)
    named = {f"d{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **named}


def our_attention(shape: AttentionShape, backend: str | None = None) -> AttentionCall:
    """`lmkern.attention`, causal as the shape says, with further options by keyword."""

    def call(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = lmkern.attention(
            q, k, v, **{"causal": shape.causal, **options}, return_lse=True, backend=backend
        )
        return out, lse

    return call


def attention_results_and_alone(
    shape: AttentionShape,
    backend: str | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    options: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """The results of ours; of the CPU's in bfloat16 also those without lse, named so."""
    results = attention_results(our_attention(shape, backend), q, k, v, dout, options=options)
    if backend != "cpu" or q.dtype != torch.bfloat16:
        return results

    def call(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out = lmkern.attention(q, k, v, **{"causal": shape.causal, **options}, backend=backend)
        assert isinstance(out, Tensor)
        return out, out

    alone = attention_results(call, q, k, v, dout, options=options)
    return results | {f"{name}{ALONE}": value for name, value in alone.items() if name != "lse"}


def torchs_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    shape: AttentionShape,
    options: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """What torch gives for CPU tensors, in their dtype: its own attention, or with options the formula."""
    if options is not None:
        return attention_results(torchs_formula, q, k, v, dout, options=options)
    mask = None
    if shape.causal and shape.N_q != shape.N_k:
        mask = torch.ones(shape.N_q, shape.N_k, dtype=torch.bool).tril(shape.N_k - shape.N_q)
    is_causal = shape.causal and mask is None

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=shape.H_kv != shape.H
        )
        keys, values = (x.detach().repeat_interleave(shape.H // shape.H_kv, 1) for x in (k, v))
        added = None if mask is None else torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -math.inf)
        # The lse of its flash kernel.
        lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.detach(), keys, values, 0.0, is_causal, attn_mask=added
        )[1]
        return out, lse

    return attention_results(call, q, k, v, dout)


def attention_errors(
    ours: dict[str, Tensor],
    shape: AttentionShape,
    features: AttentionFeatures,
    dtype: torch.dtype,
    seed: int = 0,
) -> dict[str, Errors]:
    """Errors of our results and torch's for the inputs that `attention_inputs` and `attention_options` make.

    Those of the gradients of options are counted in units of the inputs' dtype, and of the sum of their
    terms' sizes: the terms hold out, which is rounded to that dtype; and such a gradient has few elements,
    each a sum of thousands, and how well the last bits of those cancel is chance.
    """
    torchs, exact, sizes = _known(shape, features, dtype, seed)
    errors = {}
    for name, value in ours.items():
        at_least, result = 0.0, name.removesuffix(ALONE)
        if result not in ("out", "lse", "dq", "dk", "dv"):
            units = torch.finfo(dtype).eps / torch.finfo(value.dtype).eps
            at_least = float(abs(sizes[result]).max(initial=0)) * units
        errors[name] = measure(value.cpu(), torchs[result], exact[result], at_least=at_least)
    return errors


@cache
def _known(
    shape: AttentionShape, features: AttentionFeatures, dtype: torch.dtype, seed: int
) -> tuple[dict[str, Tensor], dict[str, Array], dict[str, Array]]:
    """Torch's results, the exact ones, and those with the absolute values of terms added up."""
    inputs = attention_inputs(shape, dtype, seed=seed)
    options = attention_options(shape, features, dtype, seed=seed)
    torchs = torchs_attention(*inputs, shape, options)
    exact = long_double.attention(*inputs, shape, options=options)
    if len(exact) == len(("out", "lse", "dq", "dk", "dv")):
        return torchs, exact, {}
    return torchs, exact, long_double.attention(*inputs, shape, options=options, absolute=True)


def torchs_formula(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`lmkern.attention` as models write it: products in the inputs' dtype, softmax at least in float32."""
    if "cu_seqlens" in options:
        ends = zip(options.pop("cu_seqlens").tolist(), options.pop("cu_seqlens_k").tolist(), strict=True)
        parts = [
            torchs_formula(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], **options, number=number)
            for number, ((a, c), (b, d)) in enumerate(pairwise(ends))
        ]
        out, lse = (torch.cat(x, 2) for x in zip(*parts, strict=True))
        return out, lse
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[3])
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if softcap := options.get("softcap"):
        scores = softcap * torch.tanh(scores / softcap)
    n_q, n_k = scores.shape[2:]
    offset = torch.arange(n_k) - torch.arange(n_q)[:, None] - (n_k - n_q)
    left, right = options.get("window") or (None, None)
    right = 0 if options.get("causal") else right
    hidden = torch.zeros(n_q, n_k, dtype=torch.bool)
    hidden = hidden if left is None else hidden | (offset < -left)
    hidden = hidden if right is None else hidden | (offset > right)
    if "mask" in options:
        hidden = hidden | ~options["mask"]
    if "bias" in options:
        scores = scores + options["bias"]
    if "relative_bias" in options:
        scores = scores + options["relative_bias"][:, offset + options["relative_bias"].shape[1] // 2]
    if "alibi_slopes" in options:
        scores = scores - options["alibi_slopes"][:, None, None] * offset.abs()
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    beside = scores
    if "sinks" in options:
        beside = torch.cat((scores, options["sinks"][:, None, None].expand(*scores.shape[:3], 1)), -1)
    weights = beside.softmax(-1)[..., :n_k].masked_fill(hidden, 0.0)
    if dropout_p := options.get("dropout_p"):
        number = options.get("number", 0)
        keep = keep_mask(options["dropout_seed"], dropout_p, scores.shape, outermost=number)
        weights = weights * keep * keep_scale(dropout_p)
    lse = beside.masked_fill(beside == torch.finfo(scores.dtype).min, -math.inf).logsumexp(-1)
    return weights.to(q.dtype) @ v, lse


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    shape: AttentionShape,
    dlse: Tensor | None = None,
    options: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """The reference in float64."""
    q, k, v, dout = (x.detach().double() for x in (q, k, v, dout))
    dlse = None if dlse is None else dlse.double()
    wide = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in (options or {}).items()
    }
    return attention_results(our_attention(shape, "reference"), q, k, v, dout, dlse, wide)


def layer_norm_results(
    call: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor
) -> dict[str, Tensor]:
    """y, dx, dweight and dbias of call(x, weight, bias) -> y."""
    x, weight, bias = leaves(x, weight, bias)
    y = call(x, weight, bias)
    gradients = torch.autograd.grad(y, (x, weight, bias), dy)
    return dict(zip(("y", "dx", "dweight", "dbias"), (y.detach(), *gradients), strict=True))
