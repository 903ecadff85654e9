"""Inputs for tests and benchmarks: seeded, of any dtype, laid out in memory in every way a caller may."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lmkern.testing.shapes import (
    AttentionFeatures,
    AttentionShape,
    CrossEntropyShape,
    LayerNormShape,
    LinearCrossEntropyShape,
)

# randn(*shape) gives a fresh contiguous tensor; a layout makes one and returns a (B, H, N, D) view of it.
Randn = Callable[..., Tensor]
Layout = Callable[[Randn, int, int, int, int], Tensor]

LARGE = 2**24

LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda randn, B, H, N, D: randn(B, H, N, D),
    # What a module holds after its projection: (B, N, H, D) in memory.
    "transposed": lambda randn, B, H, N, D: randn(B, N, H, D).transpose(1, 2),
    # One of three in a fused projection, (B, N, 3, H, D) in memory.
    "fused": lambda randn, B, H, N, D: randn(B, N, 3, H, D)[:, :, 1].transpose(1, 2),
    "sliced": lambda randn, B, H, N, D: randn(B + 1, H + 2, N + 3, D + 5)[1:, 2:, 3:, 4 : D + 4],
    "columns": lambda randn, B, H, N, D: randn(B, H, D, N).mT,
    "every_second": lambda randn, B, H, N, D: randn(B, H, 2 * N, 2 * D)[:, :, ::2, ::2],
    "expanded_heads": lambda randn, B, H, N, D: randn(B, 1, N, D).expand(B, H, N, D),
    "expanded_tokens": lambda randn, B, H, N, D: randn(B, H, 1, D).expand(B, H, N, D),
    "expanded_columns": lambda randn, B, H, N, D: randn(B, H, N, 1).expand(B, H, N, D),
}


def seeded_randn(seed: int, dtype: torch.dtype, device: str | torch.device | None = None) -> Randn:
    """A function of a shape: standard normal numbers from one seeded stream, the same on every device.

    More than LARGE of them are drawn by the device itself: a processor would take seconds. device: default
    torch's own, here as below.
    """
    device = torch.get_default_device() if device is None else device
    generator = torch.Generator().manual_seed(seed)
    device_generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        if math.prod(shape) > LARGE:
            return torch.randn(shape, generator=device_generator, device=device).to(dtype)
        return torch.randn(shape, generator=generator, device="cpu").to(dtype=dtype, device=device)

    return randn


def attention_inputs(
    shape: AttentionShape,
    dtype: torch.dtype = torch.float32,
    *,
    device: str | None = None,
    seed: int = 0,
    layout: str = "contiguous",
    q_factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and dout.

    layout: a name of LAYOUTS, for all four.
    q_factor: multiplies q; 64 makes softmax rows that one key has to itself.
    """
    randn, make = seeded_randn(seed, dtype, device), LAYOUTS[layout]

    def scaled(*size: int) -> Tensor:
        return randn(*size) * q_factor

    q = make(scaled, shape.B, shape.H, shape.N_q, shape.D)
    k, v = (make(randn, shape.B, shape.H_kv, shape.N_k, shape.D) for _ in range(2))
    return q, k, v, make(randn, shape.B, shape.H, shape.N_q, shape.D)


def attention_options(
    shape: AttentionShape,
    features: AttentionFeatures,
    dtype: torch.dtype = torch.float32,
    *,
    device: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The keywords of `lmkern.attention` that say it. A mask hides a fifth, and every key of some query."""
    randn = seeded_randn(seed + 1, dtype, device)
    statistics = seeded_randn(seed + 2, torch.promote_types(dtype, torch.float32), device)
    sizes = {"B": shape.B, "H": shape.H, "q": shape.N_q, "k": shape.N_k}
    reach = max(shape.N_q, shape.N_k, 1) - 1
    options: dict[str, Any] = {
        "causal": shape.causal,
        "window": features.window,
        "softcap": features.softcap,
        "dropout_p": features.dropout_p,
    }
    if features.bias is not None:
        options["bias"] = randn(*(size if name in features.bias else 1 for name, size in sizes.items()))
    if features.mask is not None:
        seen = randn(*(size if name in features.mask else 1 for name, size in sizes.items())) > -0.8
        if "q" in features.mask:
            seen[..., shape.N_q // 2 : shape.N_q // 2 + 1, :] = False
        options["mask"] = seen
    if features.relative_bias is not None:
        rows = shape.H if features.relative_bias == "H" else 1
        options["relative_bias"] = statistics(rows, 2 * reach + 1)
    if features.alibi:
        options["alibi_slopes"] = statistics(shape.H).abs() / 8
    if features.sinks:
        options["sinks"] = statistics(shape.H)
    if features.dropout_p:
        options["dropout_seed"] = torch.tensor(seed - 12345678901, device=device)
    if features.documents:
        for index, name in enumerate(("cu_seqlens", "cu_seqlens_k")):
            ends = accumulate((lengths[index] for lengths in features.documents), initial=0)
            options[name] = torch.tensor(list(ends), dtype=torch.int32, device=device)
    return options


def layer_norm_inputs(
    shape: LayerNormShape,
    dtype: torch.dtype = torch.float32,
    *,
    parameter_dtype: torch.dtype | None = None,
    device: str | None = None,
    seed: int = 0,
    mean: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (R, E) around mean, weight (E,), bias (E,) and dy (R, E). parameter_dtype: default dtype."""
    wide = seeded_randn(seed, torch.float32, device)
    parameter_dtype = parameter_dtype or dtype
    x = (wide(shape.R, shape.E) + mean).to(dtype)
    weight, bias = (wide(shape.E).to(parameter_dtype) for _ in range(2))
    return x, weight, bias, wide(shape.R, shape.E).to(dtype)


def cross_entropy_inputs(
    shape: CrossEntropyShape, dtype: torch.dtype = torch.float32, *, seed: int = 0, size: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    """logits (R, V) of that size, targets (R,) and dloss (R,) in the dtype of statistics."""
    randn = seeded_randn(seed, torch.float32)
    logits = (randn(shape.R, shape.V) * size).to(dtype)
    return (
        logits,
        seeded_targets(shape.V, shape.R, seed),
        randn(shape.R).to(torch.promote_types(dtype, torch.float32)),
    )


def linear_cross_entropy_inputs(
    shape: LinearCrossEntropyShape, dtype: torch.dtype = torch.float32, *, seed: int = 0, size: float = 3.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (R, E), weight (V, E), bias (V,), with logits of about that size, and targets (R,)."""
    randn = seeded_randn(seed, torch.float32)
    x, weight, bias = randn(shape.R, shape.E), randn(shape.V, shape.E), randn(shape.V)
    weight = weight * (size / max(shape.E, 1) ** 0.5)
    targets = seeded_targets(shape.V, shape.R, seed)
    return x.to(dtype), weight.to(dtype), bias.to(dtype), targets


def seeded_targets(V: int, R: int, seed: int) -> Tensor:
    """(R,) classes of V, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(V, (R,), generator=generator, device="cpu").to(torch.get_default_device())


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same memory and strides as fresh leaves that want gradients."""
    return tuple(x.detach().requires_grad_() for x in tensors)
