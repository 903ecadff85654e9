"""What a call gives, forward and backward: ours and torch's, under the names of the contract."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import lmkern
from lmkern.kernels.attention import Options, reference
from lmkern.testing.inputs import leaves
from lmkern.testing.shapes import AttentionShape

AttentionCall = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def attention_results(
    call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor | None = None
) -> dict[str, Tensor]:
    """out, lse, dq, dk and dv of call(q, k, v) -> (out, lse)."""
    q, k, v = leaves(q, k, v)
    out, lse = call(q, k, v)
    if dlse is None:
        gradients = torch.autograd.grad(out, (q, k, v), dout)
    else:
        gradients = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    results = (out.detach(), lse.detach(), *gradients)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), results, strict=True))


def our_attention(shape: AttentionShape, backend: str | None = None) -> AttentionCall:
    """`lmkern.attention` with the shape's options."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = lmkern.attention(q, k, v, causal=shape.causal, return_lse=True, backend=backend)
        return out, lse

    return call


def torchs_attention(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, shape: AttentionShape
) -> dict[str, Tensor]:
    """What torch's own attention gives for CPU tensors, in their dtype, with the lse of its flash kernel."""
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
        lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.detach(), keys, values, 0.0, is_causal, attn_mask=added
        )[1]
        return out, lse

    return attention_results(call, q, k, v, dout)


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, shape: AttentionShape, dlse: Tensor | None = None
) -> dict[str, Tensor]:
    """The reference in float64."""
    q, k, v, dout = (x.detach().double() for x in (q, k, v, dout))
    scale = 1 / math.sqrt(shape.D)
    options = Options(softmax_scale=scale, right=0 if shape.causal else None)
    out, lse = reference.forward(q, k, v, options)
    needs = (True, True, True, False, False, False)
    dq, dk, dv, *_ = reference.backward(dout, q, k, v, out, lse, dlse, options, needs=needs)
    assert dq is not None
    assert dk is not None
    assert dv is not None
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def layer_norm_results(
    call: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor
) -> dict[str, Tensor]:
    """y, dx, dweight and dbias of call(x, weight, bias) -> y."""
    x, weight, bias = leaves(x, weight, bias)
    y = call(x, weight, bias)
    gradients = torch.autograd.grad(y, (x, weight, bias), dy)
    return dict(zip(("y", "dx", "dweight", "dbias"), (y.detach(), *gradients), strict=True))
