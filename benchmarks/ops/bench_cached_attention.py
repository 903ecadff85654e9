"""One new token against a cache of keys and values, beside the fastest of SDPA's backends."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel

from benchmarks.contest import EAGER, Case, Compete, Contest, Inputs, Work
from benchmarks.ops.bench_attention import best_sdpa
from lmkern.ops import cached_attention
from lmkern.testing import AttentionShape, attention_inputs

OP = "cached_attention"


@dataclass(frozen=True)
class CacheCase(Case):
    """tokens_first: the caches are (B, N, H_kv, D) in memory."""

    directions: tuple[str, ...] = ("forward",)
    tokens_first: bool = False


def shape(B: int, H: int, H_kv: int, N_k: int, D: int) -> AttentionShape:
    return AttentionShape(B, H, 1, D, N_k, H_kv, True)


CASES = (
    CacheCase(shape(8, 12, 12, 4096, 64), main=True),
    CacheCase(shape(8, 12, 12, 4096, 64), note="tokens-first", tokens_first=True),
    CacheCase(shape(8, 32, 8, 4096, 128)),
    CacheCase(shape(8, 32, 4, 4096, 128)),
    CacheCase(shape(1, 12, 12, 1024, 64)),
    CacheCase(shape(3, 5, 5, 777, 80)),
)
GPU_CASES = (
    CacheCase(shape(16, 64, 8, 16_384, 128), main=True, dtypes=(torch.bfloat16,)),
    CacheCase(shape(1, 64, 8, 65_536, 128), dtypes=(torch.bfloat16,)),
)
QUICK_CASES = (
    CacheCase(shape(1, 2, 1, 40, 16), main=True),
    CacheCase(shape(1, 2, 2, 40, 16), note="tokens-first", tokens_first=True),
)


def bench_cached_attention(
    case: CacheCase, direction: str, dtype: torch.dtype, backend: str, device: torch.device, compete: Compete
) -> None:
    q, k, v, _ = attention_inputs(case.shape, dtype, device=str(device))
    if case.tokens_first:
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    inputs = Inputs((q, k, v))
    sdpa = partial(F.scaled_dot_product_attention, enable_gqa=case.shape.H_kv < case.shape.H)
    best = best_sdpa(sdpa, inputs, direction, case.shape)
    compete(
        Contest(
            ours=partial(cached_attention, backend=backend),
            competitors={EAGER: sdpa},
            eager=f"SDPA {best.name}",
            inputs=inputs,
            work=work(case.shape, dtype),
            within=sdpa_kernel(best),
        )
    )


def work(shape: AttentionShape, dtype: torch.dtype) -> Work:
    """2 products of every query head with every key; each key and value is read once."""
    queries, keys = shape.B * shape.H * shape.D, shape.B * shape.H_kv * shape.N_k * shape.D
    flops = 2 * 2 * shape.B * shape.H * shape.N_k * shape.D
    return Work(flops, 2 * (queries + keys) * dtype.itemsize + 4 * shape.B * shape.H, "copy")
