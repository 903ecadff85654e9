"""Attention, forward and backward, against the fastest of SDPA's backends, eager and under torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import AttentionCase
from benchmarks.timing import Call, clock, compiled, fastest, gradients, kept_graphs
from lmkern.kernels.backends import backend_names
from lmkern.ops import attention
from lmkern.testing import AttentionShape, attention_inputs

SDPA_BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)
# SDPA's math backend holds the scores; beyond this many of them it is a candidate only where nothing else is.
MAX_SCORES = 2**28

pytestmark = [
    pytest.mark.benchmark(timer=clock),
    pytest.mark.parametrize("backend", [name for name in backend_names("attention") if name != "reference"]),
]


def bench_attention_forward(
    attention_case: AttentionCase,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
    usable: Callable[..., None],
    contest: Callable[..., None],
) -> None:
    shape = attention_case.shape
    q, k, v, _ = inputs(attention_case, dtype, device)
    usable("attention", backend, {"q": q, "k": k, "v": v})
    sdpa = torch_attention(shape)
    eager = partial(sdpa, q, k, v)
    best = best_sdpa(shape, lambda: eager)
    with sdpa_kernel(best):
        contest(
            attention_case.work("forward", dtype),
            backend,
            partial(attention, q, k, v, causal=shape.causal, backend=backend),
            {"torch eager": eager, "torch.compile": partial(compiled(sdpa), q, k, v)},
            f"SDPA {best.name}",
        )


def bench_attention_backward(
    attention_case: AttentionCase,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
    usable: Callable[..., None],
    contest: Callable[..., None],
) -> None:
    shape = attention_case.shape
    q, k, v, dout = inputs(attention_case, dtype, device)
    usable("attention", backend, {"q": q, "k": k, "v": v})
    for x in (q, k, v):
        x.requires_grad_()
    sdpa = torch_attention(shape)

    def backward(function: Callable[..., Any], **options: Any) -> Call:
        return gradients(function(q, k, v, **options), (q, k, v), dout)

    best = best_sdpa(shape, lambda: backward(sdpa))
    with sdpa_kernel(best), kept_graphs():
        contest(
            attention_case.work("backward", dtype),
            backend,
            backward(attention, causal=shape.causal, backend=backend),
            {"torch eager": backward(sdpa), "torch.compile": backward(compiled(sdpa))},
            f"SDPA {best.name}",
        )


def inputs(case: AttentionCase, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return attention_inputs(case.shape, dtype, device=str(device), q_factor=64.0 if case.peaky else 1.0)


def torch_attention(shape: AttentionShape) -> Callable[..., Tensor]:
    """SDPA of q, k and v that sees what our causal sees.

    Torch counts from the first query, we from the last: the same where N_q = N_k; one query sees every key.
    """
    if shape.causal and shape.N_q not in (1, shape.N_k):
        raise ValueError(
            f"torch_attention: causal needs N_q = N_k or N_q = 1 to be the same in torch; got {shape}"
        )
    return partial(
        F.scaled_dot_product_attention,
        is_causal=shape.causal and shape.N_q == shape.N_k,
        enable_gqa=shape.H_kv < shape.H,
    )


def best_sdpa(shape: AttentionShape, prepare: Callable[[], Call]) -> SDPBackend:
    """The fastest of SDPA's backends here; prepare makes the call to time, under each backend."""
    calls: dict[SDPBackend, Call] = {}
    for backend in SDPA_BACKENDS:
        if backend is SDPBackend.MATH and shape.scores > MAX_SCORES and calls:
            continue
        with sdpa_kernel(backend), warnings.catch_warnings():
            # A backend that cannot take the call says so in warnings and then raises.
            warnings.simplefilter("ignore")
            try:
                call = prepare()
                call()
            except RuntimeError:
                continue
            calls[backend] = within(backend, call)
    return fastest(calls)  # type: ignore[no-any-return]


def within(backend: SDPBackend, call: Call) -> Call:
    def run() -> None:
        with sdpa_kernel(backend):
            call()

    return run
