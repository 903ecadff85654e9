"""Calls that together launch every Triton kernel in every configuration: for compiling, and for counting
compilations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import lmkern
from lmkern.kernels import backends
from lmkern.testing.inputs import attention_inputs, attention_options, leaves
from lmkern.testing.shapes import ATTENTION_FEATURES, AttentionFeatures, AttentionShape

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@dataclass(frozen=True)
class TritonCase:
    """A call of an op, forward and backward.

    run(B, N): on B sequences of N tokens.
    everywhere: compiled for every architecture, not for sm_90 alone.
    further: of tuned constants that another case has too; compiled where time does not matter.
    """

    op: str
    name: str
    run: Callable[[int, int], Any]
    everywhere: bool = False
    further: bool = False

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def triton_cases() -> list[TritonCase]:
    """The cases of every op that has a Triton backend."""
    return [case for case in _all_cases() if "triton" in backends.backend_names(case.op)]


def _all_cases() -> Iterator[TritonCase]:
    for dtype, head_dims in ((BF16, (32, 64, 128, 256, 80)), (FP16, (40,)), (FP32, (32, 64, 128, 256))):
        for D in head_dims:
            run = partial(_attention, dtype, D, AttentionFeatures(), True)
            yield TritonCase("attention", f"{_word(dtype)}-D{D}-causal", run, (dtype, D) == (BF16, 128))
    yield TritonCase(
        "attention", "float32-D64-full", partial(_attention, FP32, 64, AttentionFeatures(), False)
    )
    yield TritonCase(
        "attention", "bfloat16-D128-full", partial(_attention, BF16, 128, AttentionFeatures(), False)
    )
    for features in ATTENTION_FEATURES:
        run = partial(_attention, BF16, 64, features, False)
        most = features == ATTENTION_FEATURES[-1]
        yield TritonCase("attention", f"bfloat16-D64-{features}", run, further=not most)
    packed = AttentionFeatures(documents=((1, 1),))
    yield TritonCase("attention", "bfloat16-D128-packed", partial(_attention, BF16, 128, packed, True))
    # A cache is contiguous: where 16 does not divide D, only every other length makes it divide a head's.
    for dtype, D, paged in (
        (BF16, 128, False), (BF16, 128, True), (FP32, 64, False), (BF16, 80, False), (FP16, 40, False),
    ):  # fmt: skip
        name = f"{_word(dtype)}-D{D}{'-paged' if paged else ''}"
        yield TritonCase(
            "cached_attention", name, partial(_cached_attention, dtype, D, paged), name == "bfloat16-D128"
        )

    for E in (8, 128, 768, 1024, 4096, 8192, 16384, 65536):
        yield TritonCase("layer_norm", f"bfloat16-E{E}", partial(_layer_norm, BF16, E), E == 16384)
        # Layer norm's kernels, without a mean.
        further = E not in (4096, 65536)
        yield TritonCase("rms_norm", f"bfloat16-E{E}", partial(_rms_norm, BF16, E), further=further)
        for p in (0.0, 0.1):
            name = f"bfloat16-E{E}{'-dropout' if p else ''}"
            run = partial(_add_norm, BF16, E, p)
            yield TritonCase("add_norm", name, run, E == 4096 and p > 0, further=E in (8, 128, 1024))
    yield TritonCase("layer_norm", "float32-E4096", partial(_layer_norm, FP32, 4096))
    yield TritonCase("layer_norm", "float64-E1000", partial(_layer_norm, FP64, 1000))

    for dtype, V in ((BF16, 50_304), (BF16, 131_072), (FP32, 4096), (FP32, 100)):
        for plain in (True, False):
            name = f"{_word(dtype)}-V{V}{'' if plain else '-all options'}"
            run = partial(_cross_entropy, dtype, V, plain)
            yield TritonCase("cross_entropy", name, run, V == 50_304 and plain)
    for dtype in (BF16, FP32):
        for plain in (True, False):
            name = f"{_word(dtype)}{'' if plain else '-all options'}"
            run = partial(_linear_cross_entropy, dtype, plain)
            yield TritonCase("linear_cross_entropy", name, run, further=not plain)

    for dtype in (BF16, FP32):
        for interleaved in (False, True):
            name = f"{_word(dtype)}{'-interleaved' if interleaved else ''}"
            run = partial(_rotary, dtype, 128, interleaved)
            yield TritonCase("rotary", name, run, name == "bfloat16")
            odd = partial(_rotary, dtype, 40, interleaved)
            yield TritonCase("rotary", f"{name}-D40", odd, further=dtype == FP32)
        for function in ("gelu", "gelu_tanh", "swiglu", "geglu"):
            run = partial(_activation, dtype, function)
            name, sample = f"{_word(dtype)}-{function}", (dtype, function) == (BF16, "swiglu")
            yield TritonCase("activation", name, run, sample, further=dtype == FP32 and function != "gelu")
        yield TritonCase("embedding", _word(dtype), partial(_embedding, dtype))
        yield TritonCase("copy", f"{_word(dtype)}-transposed", partial(_transposed_copy, dtype))
    yield TritonCase("copy", "cast", _cast)
    yield TritonCase("adamw", "float32", partial(_adamw, None))
    yield TritonCase("adamw", "with a bfloat16 copy", partial(_adamw, BF16))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _leaf(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=dtype).requires_grad_()


def _backward(outputs: Tensor | tuple[Tensor, ...], *inputs: Tensor) -> None:
    """Gradients for dense upstream gradients, as a model's are."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs])


def _attention(dtype: torch.dtype, D: int, features: AttentionFeatures, causal: bool, B: int, N: int) -> None:
    if features.documents:
        ends = [0, N // 3, N // 3, N] if B > 1 else [0, N]
        documents = tuple((end - start, end - start) for start, end in pairwise(ends))
        features, B = AttentionFeatures(documents=documents), 1
    shape = AttentionShape(B, 4, N, D, N, 2, causal)
    # A stride over heads is a multiple of 16 for some lengths alone where the heads are contiguous.
    *qkv, _ = attention_inputs(shape, dtype, layout="contiguous" if D % 16 else "transposed")
    options = attention_options(shape, features, dtype)
    q, k, v = leaves(*qkv)
    inputs = [q, k, v]
    for name, option in options.items():
        if isinstance(option, Tensor) and option.is_floating_point():
            options[name] = leaves(option)[0]
            inputs.append(options[name])
    out, lse = lmkern.attention(q, k, v, **options, return_lse=True, backend="triton")
    _backward((out, lse), *inputs)


def _cached_attention(dtype: torch.dtype, D: int, paged: bool, B: int, N: int) -> None:
    q = torch.zeros(B, 8, 1, D, dtype=dtype)
    lengths = torch.full((B,), N, dtype=torch.int32)
    if not paged:
        k, v = (torch.zeros(B, 2, N, D, dtype=dtype) for _ in range(2))
        lmkern.cached_attention(q, k, v, lengths=lengths, backend="triton")
        return
    pages = -(-N // 16)
    k, v = (torch.zeros(B * pages, 2, 16, D, dtype=dtype) for _ in range(2))
    table = torch.arange(B * pages, dtype=torch.int32).view(B, pages)
    lmkern.cached_attention(q, k, v, lengths=lengths, page_table=table, backend="triton")


def _layer_norm(dtype: torch.dtype, E: int, B: int, N: int) -> None:
    x, weight, bias = _leaf(dtype, B, N, E), _leaf(dtype, E), _leaf(dtype, E)
    y = lmkern.layer_norm(x, (E,), weight, bias, backend="triton")
    _backward(y, x, weight, bias)
    _backward(lmkern.layer_norm(x, (E,), weight, bias, backend="triton"), x)
    _backward(lmkern.layer_norm(x, (E,), weight, bias, backend="triton"), weight, bias)


def _rms_norm(dtype: torch.dtype, E: int, B: int, N: int) -> None:
    x, weight = _leaf(dtype, B, N, E), _leaf(dtype, E)
    _backward(lmkern.rms_norm(x, (E,), weight, offset=1.0, backend="triton"), x, weight)


def _add_norm(dtype: torch.dtype, E: int, dropout_p: float, B: int, N: int) -> None:
    x, residual = _leaf(dtype, B, N, E), _leaf(dtype, B, N, E)
    weight, bias = _leaf(dtype, E), _leaf(dtype, E)
    results = lmkern.add_norm(
        x, residual, weight, bias, dropout_p=dropout_p, dropout_seed=torch.tensor(1), backend="triton"
    )
    _backward(results, x, residual, weight, bias)


def _loss_options(plain: bool) -> dict[str, Any]:
    return {} if plain else {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0}


def _cross_entropy(dtype: torch.dtype, V: int, plain: bool, B: int, N: int) -> None:
    logits, targets = _leaf(dtype, min(B * N, 8), V), torch.zeros(min(B * N, 8), dtype=torch.int64)
    options = _loss_options(plain)
    _backward(lmkern.cross_entropy(logits, targets, **options, backend="triton"), logits)


def _linear_cross_entropy(dtype: torch.dtype, plain: bool, B: int, N: int) -> None:
    x, weight = _leaf(dtype, B * N, 64), _leaf(dtype, 1024, 64)
    targets = torch.zeros(B * N, dtype=torch.int64)
    options = _loss_options(plain)
    loss = lmkern.linear_cross_entropy(x, weight, targets, **options, backend="triton")
    _backward(loss, x, weight)


def _rotary(dtype: torch.dtype, D: int, interleaved: bool, B: int, N: int) -> None:
    # As _attention's.
    x = (
        torch.zeros(B, 4, N, D, dtype=dtype)
        if D % 16
        else torch.zeros(B, N, 4, D, dtype=dtype).transpose(1, 2)
    )
    x.requires_grad_()
    cos, sin = torch.zeros(N, D // 2), torch.zeros(N, D // 2)
    _backward(lmkern.rotary(x, cos, sin, interleaved=interleaved, backend="triton"), x)
    if not interleaved:
        lmkern.rotary(x.detach(), cos, sin, inplace=True, backend="triton")


def _activation(dtype: torch.dtype, function: str, B: int, N: int) -> None:
    x, bias = _leaf(dtype, B, N, 2048), _leaf(dtype, 2048)
    if function.startswith("gelu"):
        approximate: Any = "tanh" if function == "gelu_tanh" else "none"
        _backward(lmkern.gelu(x, bias, approximate, backend="triton"), x, bias)
        _backward(lmkern.gelu(x, None, approximate, backend="triton"), x)
    else:
        gated = lmkern.swiglu if function == "swiglu" else lmkern.geglu
        _backward(gated(x, bias, backend="triton"), x, bias)
        _backward(gated(x, backend="triton"), x)


def _embedding(dtype: torch.dtype, B: int, N: int) -> None:
    weight = _leaf(dtype, 1000, 768)
    _backward(lmkern.embedding(torch.zeros(B, N, dtype=torch.int64), weight, backend="triton"), weight)


def _transposed_copy(dtype: torch.dtype, B: int, N: int) -> None:
    lmkern.transposed_copy(torch.zeros(B * N, 256, dtype=dtype), backend="triton")


def _cast(B: int, N: int) -> None:
    lmkern.cast(torch.zeros(B, N, 256), BF16, backend="triton")
    lmkern.cast(torch.zeros(B, N, 256, dtype=BF16), FP32, backend="triton")


def _adamw(copy: torch.dtype | None, B: int, N: int) -> None:
    state = [torch.zeros(B * N, 64) for _ in range(4)]
    shadow = None if copy is None else torch.zeros(B * N, 64, dtype=copy)
    lmkern.adamw_(
        *state,
        lr=1e-3,
        beta1=0.9,
        beta2=0.99,
        eps=1e-8,
        weight_decay=0.1,
        step=N,
        copy=shadow,
        backend="triton",
    )
