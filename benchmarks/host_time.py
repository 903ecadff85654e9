"""What an op costs the host on Triton's backend: python -m benchmarks.host_time [word in a case's name ...]

Small calls, so that a GPU is done before the host is; without a GPU the same calls on CPU tensors, with
everything that the host does up to Triton's launcher, which is left out. Microseconds a call, the least of
several rounds and their median; forward runs without gradients, "both" is forward and backward.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor

import lmkern

Call = Callable[[], Any]

# A stream holds about a thousand launches: in a round the host never waits for it.
CALLS, ROUNDS, WARM_UPS = 100, 25, 20


def cases(device: str) -> Iterator[tuple[str, Call, list[Tensor]]]:
    """Name, call, and what it is differentiated by; none for what has no gradient."""
    x, heads = leaf(device, 64, 768), leaf(device, 1, 64, 8, 64, transposed=True)
    weight, bias = leaf(device, 768), leaf(device, 768)
    q, k, v = (leaf(device, 1, 64, 8, 64, transposed=True) for _ in range(3))
    cache = torch.zeros(1, 8, 64, 64, dtype=torch.bfloat16, device=device)
    logits, vocabulary = leaf(device, 64, 1000), leaf(device, 1000, 768)
    tokens = torch.zeros(64, dtype=torch.int64, device=device)
    lengths = torch.full((1,), 64, dtype=torch.int32, device=device)
    table = torch.zeros(64, 32, device=device)
    state = [torch.zeros(64, 64, device=device) for _ in range(4)]
    step = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "step": 3}
    on: dict[str, Any] = {"backend": "triton"}
    yield "attention", lambda: lmkern.attention(q, k, v, causal=True, **on), [q, k, v]
    yield (
        "cached_attention",
        lambda: lmkern.cached_attention(cache[:, :, :1], cache, cache, lengths=lengths, **on),
        [],
    )
    yield "layer_norm", lambda: lmkern.layer_norm(x, (768,), weight, bias, **on), [x, weight, bias]
    yield "rms_norm", lambda: lmkern.rms_norm(x, (768,), weight, **on), [x, weight]
    yield "add_norm", lambda: lmkern.add_norm(x, x, weight, bias, **on)[0], [x, weight, bias]
    yield "gelu", lambda: lmkern.gelu(x, bias, **on), [x, bias]
    yield "swiglu", lambda: lmkern.swiglu(x, **on), [x]
    yield "cross_entropy", lambda: lmkern.cross_entropy(logits, tokens, **on), [logits]
    yield "embedding", lambda: lmkern.embedding(tokens, vocabulary, **on), [vocabulary]
    yield "rotary", lambda: lmkern.rotary(heads, table, table, **on), [heads]
    yield "cast", lambda: lmkern.cast(x, torch.float32, **on), [x]
    yield "adamw", lambda: lmkern.adamw_(*state, **step, **on), []


def leaf(device: str, *shape: int, transposed: bool = False) -> Tensor:
    x = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    return (x.transpose(1, 2) if transposed else x).requires_grad_()


def microseconds(call: Call) -> list[float]:
    """Of the host for a call, in each round, the least first."""
    times = []
    for _ in range(WARM_UPS):
        call()
    for _ in range(ROUNDS):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return sorted(times)


def both(call: Call, inputs: list[Tensor]) -> Call:
    output = call()
    upstream = torch.ones_like(output)
    return lambda: torch.autograd.grad(call(), inputs, upstream)


def on_device() -> tuple[str, AbstractContextManager[None]]:
    """Where tensors lie, and what stands in for a GPU."""
    if torch.cuda.is_available():
        return "cuda", nullcontext()
    from lmkern.testing.offline import launching

    torch.set_num_threads(1)
    return "cpu", launching("sm_90", lambda *_: None)


def main(words: list[str]) -> None:
    device, launches = on_device()
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU tensors, the launch left out"
    print(f"us of the host a call, least (median); {where}")
    with launches:
        for name, call, inputs in cases(device):
            if words and not any(word in name for word in words):
                continue
            with torch.no_grad():
                columns = [microseconds(call)]
            if inputs:
                columns.append(microseconds(both(call, inputs)))
            print(
                f"{name:20}" + "".join(f"{times[0]:8.1f} ({median(times):.1f})" for times in columns),
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
