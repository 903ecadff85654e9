"""Attention against the fastest of SDPA's backends, eager and under torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.contest import EAGER, Case, Compete, Contest, Inputs, Work
from benchmarks.timing import Call, call_of, fastest
from lmkern.ops import attention
from lmkern.testing import ATTENTION_BENCHMARK_SHAPES, AttentionShape, attention_inputs

OP = "attention"
SDPA_BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)
# The default on a GPU is not the fastest there: each that matters has a time of its own.
GPU_BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention-2": SDPBackend.FLASH_ATTENTION,
}
# SDPA's math backend holds the scores; beyond this many of them it is a candidate only where nothing else is.
MAX_SCORES = 2**26


@dataclass(frozen=True)
class AttentionCase(Case):
    """q_factor: multiplies q. With 64, one key has most of a softmax row to itself: peaky logits."""

    q_factor: float = 1.0


MAIN = AttentionShape(4, 12, 1024, 64, 1024, 12, True)
LONGEST = AttentionShape(1, 8, 8192, 128, 8192, 8, True, "the longest sequence, a second a pass")
CASES = (
    *(AttentionCase(shape, main=str(shape) == str(MAIN)) for shape in ATTENTION_BENCHMARK_SHAPES),
    AttentionCase(AttentionShape(8, 12, 256, 64, 256, 12, True, "a small model's context")),
    AttentionCase(AttentionShape(1, 16, 2048, 128, 2048, 16, True, "head_dim 128")),
    AttentionCase(AttentionShape(1, 16, 2048, 128, 2048, 16, False, "head_dim 128 without a mask")),
    AttentionCase(LONGEST, dtypes=(torch.bfloat16,)),
    AttentionCase(AttentionShape(3, 5, 333, 80, 333, 5, True, "nothing is a power of two")),
    AttentionCase(MAIN, note="peaky", q_factor=64.0),
    AttentionCase(AttentionShape(8, 12, 256, 64, 256, 12, True), note="peaky", q_factor=64.0),
    AttentionCase(AttentionShape(1, 16, 2048, 128, 2048, 16, True), note="peaky", q_factor=64.0),
)


def gpu_case(N: int, D: int, H_kv: int, causal: bool, *, main: bool = False) -> AttentionCase:
    """One sequence of 64 query heads."""
    return AttentionCase(AttentionShape(1, 64, N, D, N, H_kv, causal), main=main, dtypes=(torch.bfloat16,))


GPU_CASES = (
    gpu_case(16_384, 128, 8, False),
    gpu_case(16_384, 128, 64, False),
    gpu_case(8192, 128, 8, False),
    *(gpu_case(N, 128, 8, True, main=N == 8192) for N in (2048, 4096, 8192, 16_384)),
    gpu_case(8192, 128, 64, True),
    *(gpu_case(16_384, 64, 8, causal) for causal in (False, True)),
    gpu_case(4096, 256, 8, True),
)
QUICK_CASES = (
    AttentionCase(AttentionShape(1, 4, 40, 16, 40, 2, True), main=True),
    AttentionCase(AttentionShape(1, 2, 1, 16, 40, 2, True)),
    AttentionCase(AttentionShape(1, 2, 33, 20, 33, 2, True), note="peaky", q_factor=64.0),
)


def bench_attention(
    case: AttentionCase,
    direction: str,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
    compete: Compete,
) -> None:
    shape = case.shape
    inputs = inputs_of(shape, dtype, device, case.q_factor)
    sdpa = torch_attention(shape)
    best = best_sdpa(sdpa, inputs, direction, shape)
    ordinary = None
    if case.q_factor != 1.0:
        ordinary = ("ordinary logits", inputs_of(shape, dtype, device))
    compete(
        Contest(
            ours=partial(attention, causal=shape.causal, backend=backend),
            competitors={EAGER: sdpa} | named_backends(sdpa, inputs, direction),
            eager=f"SDPA {best.name}",
            inputs=inputs,
            work=work(shape, direction, dtype),
            within=sdpa_kernel(best),
            baseline=ordinary,
        )
    )


def inputs_of(
    shape: AttentionShape, dtype: torch.dtype, device: torch.device, q_factor: float = 1.0
) -> Inputs:
    q, k, v, dout = attention_inputs(shape, dtype, device=str(device), q_factor=q_factor)
    return Inputs((q, k, v), leaves=(q, k, v), gradients=(dout,))


def work(shape: AttentionShape, direction: str, dtype: torch.dtype) -> Work:
    """Forward: 2 matrix products over the scores that are seen; backward: 5."""
    products, passes = {"forward": (2, 1), "backward": (5, 2), "both": (7, 3)}[direction]
    flops = products * 2 * shape.B * shape.H * seen_scores(shape) * shape.D
    queries, keys = shape.B * shape.H * shape.N_q * shape.D, shape.B * shape.H_kv * shape.N_k * shape.D
    # Forward: q, out, k, v, and lse written. Backward: q, out, dout, dq, k, v, dk, dv, and lse read.
    size = 2 * passes * (queries + keys) * dtype.itemsize + 4 * shape.B * shape.H * shape.N_q
    return Work(flops, size, "matmul")


def seen_scores(shape: AttentionShape) -> int:
    """Elements of one head's score matrix that its mask leaves."""
    if shape.diagonal is None:
        return shape.N_q * shape.N_k
    return sum(min(max(i + shape.diagonal + 1, 0), shape.N_k) for i in range(shape.N_q))


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


def best_sdpa(
    sdpa: Callable[..., Tensor], inputs: Inputs, direction: str, shape: AttentionShape
) -> SDPBackend:
    """The fastest of SDPA's backends here."""
    calls: dict[SDPBackend, Call] = {}
    for backend in SDPA_BACKENDS:
        if backend is SDPBackend.MATH and shape.scores > MAX_SCORES and calls:
            continue
        with sdpa_kernel(backend), warnings.catch_warnings():
            # A backend that cannot take the call says so in warnings and then raises.
            warnings.simplefilter("ignore")
            try:
                call = call_of(sdpa, inputs, direction)
                call()
            except RuntimeError:
                continue
            calls[backend] = within(backend, call)
    return fastest(calls)  # type: ignore[no-any-return]


def named_backends(
    sdpa: Callable[..., Tensor], inputs: Inputs, direction: str
) -> dict[str, Callable[..., Tensor]]:
    """On a GPU: cuDNN and FlashAttention-2, each where it takes the call."""
    found = {}
    for name, backend in GPU_BACKENDS.items() if inputs.arguments[0].is_cuda else ():
        function = with_backend(backend, sdpa)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                call_of(function, inputs, direction)()
            except RuntimeError:
                continue
        found[name] = function
    return found


def with_backend(backend: SDPBackend, sdpa: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*arguments: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(*arguments)

    return run


def within(backend: SDPBackend, call: Call) -> Call:
    def run() -> None:
        with sdpa_kernel(backend):
            call()

    return run
