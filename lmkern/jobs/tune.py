"""Searching the constants of Triton kernels on the GPU at hand, for `lmkern tune-kernels`."""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import lmkern
from lmkern.kernels import backends, tuning
from lmkern.kernels.tuning import Key
from lmkern.machine import accelerator

# A candidate must be this much faster than the default to take its place: less is noise.
WORTHWHILE = 1.03
# Norm of the difference from the default's result / its norm: other tiles add in another order.
TOLERANCE = 2e-2
# What a constant may become, beside its default.
STEPS: dict[str, Callable[[int], Sequence[int]]] = {
    "num_warps": lambda n: [m for m in (n // 2, 2 * n) if 4 <= m <= 32],
    "num_stages": lambda n: [m for m in (n - 1, n + 1, n + 2) if 1 <= m <= 5],
    "STAGES": lambda n: [m for m in (n - 1, n + 1) if 1 <= m <= 4],
}

Progress = Callable[[str, int, int | None], None]
Results = tuple[Tensor, ...]
Call = Callable[[], Results]


@dataclass(frozen=True)
class Workload:
    """A call that launches an op's kernels on shapes that training has. make(device) gives the call."""

    op: str
    make: Callable[[str], Call]


@dataclass(frozen=True)
class Found:
    """What a search chose for a key. speedup: time of the default / that of the choice."""

    key: Key
    constants: dict[str, int]
    speedup: float

    @property
    def words(self) -> str:
        """BLOCK_M=128 num_warps=8"""
        return " ".join(f"{name}={value}" for name, value in self.constants.items())


def tune(
    op: str | None = None,
    *,
    again: bool = False,
    progress: Progress = lambda *_: None,
    workloads: Sequence[Workload] | None = None,
    device: str = "cuda",
    measure: Callable[[Call], float] | None = None,
) -> list[Found]:
    """Search every key of the op's kernels (None: of all) that the user's file has not, writing as it finds.

    ValueError without a GPU, for an op that has no kernels to tune, and for a broken file.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "tune-kernels: expected a CUDA or ROCm GPU; none is visible. Kernels run with their defaults"
        )
    every = [work for work in workloads or WORKLOADS if "triton" in backends.backend_names(work.op)]
    chosen = [work for work in every if op in (None, work.op)]
    if not chosen:
        names = ", ".join(dict.fromkeys(work.op for work in every))
        raise ValueError(f"tune-kernels: expected op to be one of {names}; got {op!r}")
    path, architecture = tuning.cache_path(), tuning.architecture(torch.device(device))
    known = {key: value for key, value in tuning.load(path).items() if key[0] == architecture}
    found: list[Found] = []
    for number, work in enumerate(chosen):
        call = work.make(device)
        with tuning.override({}), tuning.observe() as looked_up:
            call()
        for key, default in looked_up.items():
            if key in known and not (again and key not in {one.key for one in found}):
                continue
            title = f"workload {number + 1} of {len(chosen)}, {' '.join(key[1:])}"
            best = search(call, key, default, measure or gpu_seconds, partial(progress, title))
            found.append(best)
            known[key] = best.constants
            about = {"gpu": accelerator() or "none", "triton": importlib.metadata.version("triton")}
            tuning.save(path, architecture, known, about)
    return found


def search(
    call: Call,
    key: Key,
    default: Mapping[str, int],
    measure: Callable[[Call], float],
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Found:
    """The fastest constants for a key, of those that give the default's results and spill no registers."""
    with tuning.override({key: default}):
        expected = call()
        base = measure(call)
    best, best_time = dict(default), base
    every = list(candidates(default))
    for number, candidate in enumerate(every):
        progress(number, len(every))
        with tuning.override({key: candidate}):
            time = candidate_seconds(call, expected, measure)
        if time is not None and time < best_time:
            best, best_time = candidate, time
    if base < WORTHWHILE * best_time:
        best, best_time = dict(default), base
    return Found(key, best, base / best_time)


def candidates(default: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Every combination of the default's constants and their neighbours, but the default itself."""
    names = list(default)
    values = [[default[name], *STEPS.get(name, half_and_double)(default[name])] for name in names]
    for choice in itertools.product(*values):
        candidate = dict(zip(names, choice, strict=True))
        if candidate != default:
            yield candidate


def half_and_double(n: int) -> list[int]:
    return [m for m in (n // 2, 2 * n) if m >= 1]


def candidate_seconds(call: Call, expected: Results, measure: Callable[[Call], float]) -> float | None:
    """Time of the call; None where it cannot run, spills registers or gives other results."""
    try:
        with launched() as kernels:
            results = call()
            if any(getattr(kernel, "n_spills", 0) for kernel in kernels):
                return None
        if not all(map(agree, results, expected)):
            return None
        return measure(call)
    # Too much shared memory, a tile that a product does not take: Triton has an exception for each.
    except Exception:
        return None


def agree(ours: Tensor, expected: Tensor) -> bool:
    difference, size = (ours.double() - expected.double()).norm(), expected.double().norm()
    # Written so that NaN does not agree.
    return bool(difference <= TOLERANCE * size)


def gpu_seconds(call: Call) -> float:
    """Median time of the call with a cache that was written over before each."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=40, return_mode="median")) / 1e3


@contextmanager
def launched() -> Iterator[list[Any]]:
    """Collects the compiled kernels that are launched within it."""
    from lmkern.kernels.triton_launch import Kernel

    kernels: list[Any] = []
    original = Kernel.launch

    def launch(*arguments: Any, **constants: Any) -> Any:
        kernels.append(original(*arguments, **constants))
        return kernels[-1]

    with mock.patch.object(Kernel, "launch", launch):
        yield kernels


def _norm(E: int, dropout_p: float, device: str, elements: int = 2**25) -> Call:
    """Forward and backward of add_norm, whose kernels all norms share, on 64 MiB."""
    R = elements // E
    generator = torch.Generator(device).manual_seed(0)
    x, residual, dy, dh = (
        torch.randn(R, E, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(4)
    )
    weight, bias = torch.ones(E, device=device), torch.zeros(E, device=device)
    inputs = [tensor.requires_grad_() for tensor in (x, residual, weight, bias)]
    options = {"dropout_p": dropout_p, "dropout_seed": torch.tensor(1, device=device)} if dropout_p else {}

    def call() -> Results:
        results = lmkern.add_norm(*inputs, **options, backend="triton")  # type: ignore[arg-type]
        return (*results, *torch.autograd.grad(results, inputs, (dy, dh)))

    return call


def _attention(D: int, dtype: torch.dtype, N: int, device: str) -> Call:
    """Forward and backward of one causal sequence of 16 heads."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, N, 16, D, generator=generator, device=device).to(dtype).transpose(1, 2)
        for _ in range(4)
    )
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]

    def call() -> Results:
        out: Any = lmkern.attention(*inputs, causal=True, backend="triton")
        return (out, *torch.autograd.grad(out, inputs, dout))

    return call


def _cross_entropy(V: int, device: str, elements: int = 2**28) -> Call:
    generator = torch.Generator(device).manual_seed(0)
    R = elements // V
    logits = torch.randn(R, V, generator=generator, device=device, dtype=torch.bfloat16).requires_grad_()
    targets = torch.arange(R, device=device) % V

    def call() -> Results:
        loss = lmkern.cross_entropy(logits, targets, backend="triton")
        return (loss, *torch.autograd.grad(loss, logits))

    return call


def _activation(function: Any, gated: bool, device: str, rows: int = 2**13) -> Call:
    """Forward and backward of 8,192 features with a bias."""
    generator = torch.Generator(device).manual_seed(0)
    x, dy = (
        torch.randn(rows, width, generator=generator, device=device, dtype=torch.bfloat16)
        for width in (16_384 if gated else 8192, 8192)
    )
    bias = torch.zeros(x.shape[1], device=device, dtype=torch.bfloat16)
    inputs = [x.requires_grad_(), bias.requires_grad_()]

    def call() -> Results:
        y = lmkern.activation(inputs[0], inputs[1], function, gated=gated, backend="triton")
        return (y, *torch.autograd.grad(y, inputs, dy))

    return call


def _rotary(D: int, device: str, tokens: int = 8192) -> Call:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(1, tokens, 64, D, generator=generator, device=device, dtype=torch.bfloat16)
    angles = torch.rand(tokens, D // 2, generator=generator, device=device)
    return lambda: (lmkern.rotary(x.transpose(1, 2), angles.cos(), angles.sin(), backend="triton"),)


def _cached_attention(D: int, device: str, tokens: int = 16_384) -> Call:
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(8, heads, n, D, generator=generator, device=device, dtype=torch.bfloat16)
        for heads, n in ((32, 1), (8, tokens), (8, tokens))
    )

    def call() -> Results:
        out = lmkern.cached_attention(q, k, v, backend="triton")
        assert isinstance(out, Tensor)
        return (out,)

    return call


WORKLOADS = (
    *(Workload("attention", partial(_attention, D, torch.bfloat16, 4096)) for D in (32, 64, 128, 256)),
    *(Workload("attention", partial(_attention, D, torch.float32, 2048)) for D in (32, 64, 128, 256)),
    *(Workload("cached_attention", partial(_cached_attention, D)) for D in (64, 128)),
    *(Workload("layer_norm", partial(_norm, 2**power, 0.0)) for power in range(6, 18)),
    *(Workload("layer_norm", partial(_norm, 2**power, 0.1)) for power in range(9, 15)),
    *(Workload("cross_entropy", partial(_cross_entropy, V)) for V in (2048, 131_072)),
    *(Workload("activation", partial(_activation, *kind)) for kind in (("silu", True), ("gelu", False))),
    *(Workload("rotary", partial(_rotary, D)) for D in (64, 128)),
)
