"""Every backend of every op on a GPU: against float64, the same bits ten times, from memory that was NaN,
and with more elements than 32 bits count.

Each is a process of its own under `make gpu`, so ids begin with the op and tests are small.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import lmkern
from lmkern.kernels import backends
from lmkern.testing import (
    AttentionFeatures,
    AttentionShape,
    attention_inputs,
    attention_options,
    leaves,
    poisoned_memory,
    seeded_randn,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GPU_BACKENDS = ("triton", "cuda")
REPEATS = 10
# Norm of the difference / norm of the exact result; tests/ops holds the fine bounds.
TOLERANCE = {FP32: 2e-5, FP16: 4e-3, BF16: 2e-2}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and none is visible"),
]

# From inputs by name to results by name: outputs, and gradients as "d" + name.
Run = Callable[..., dict[str, Tensor]]


@dataclass(frozen=True)
class Op:
    """make(dtype, device) gives the inputs; run(backend, **inputs) the results."""

    op: str
    name: str
    make: Callable[[torch.dtype, str], dict[str, Any]]
    run: Run
    dtypes: tuple[torch.dtype, ...] = (BF16, FP16, FP32)

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def with_gradients(
    function: Callable[..., Any], cotangents: tuple[str, ...], **inputs: Any
) -> dict[str, Tensor]:
    """Outputs of function(**inputs without cotangents) and the gradients of its floating inputs.

    Without cotangents the output is one number.
    """
    upstream = [inputs.pop(name) for name in cotangents] or None
    wanted = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            wanted[name] = inputs[name] = leaves(value)[0]
    outputs = function(**inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    gradients = torch.autograd.grad(outputs, list(wanted.values()), upstream)
    named = {f"output {place}": output.detach() for place, output in enumerate(outputs)}
    return named | {f"d{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}


def attention(
    name: str, shape: AttentionShape, features: AttentionFeatures | None = None, layout: str = "contiguous"
) -> Op:
    features = features or AttentionFeatures()

    def make(dtype: torch.dtype, device: str) -> dict[str, Any]:
        q, k, v, dout = attention_inputs(shape, dtype, device=device, layout=layout)
        dlse = seeded_randn(9, FP32, device)(*q.shape[:3])
        options = attention_options(shape, features, dtype, device=device)
        return {"q": q, "k": k, "v": v, "dout": dout, "dlse": dlse, **options}

    def run(backend: str, **inputs: Any) -> dict[str, Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
            return lmkern.attention(q, k, v, **options, return_lse=True, backend=backend)

        return with_gradients(call, ("dout", "dlse"), **inputs)

    return Op("attention", f"{name}-{shape}-{features}", make, run)


def cached(name: str, H: int, H_kv: int, N: int, D: int, *, paged: bool) -> Op:
    def make(dtype: torch.dtype, device: str) -> dict[str, Any]:
        randn = seeded_randn(0, dtype, device)
        lengths = torch.tensor([N, 1, N // 2], dtype=torch.int32, device=device)
        inputs = {"q": randn(3, H, 1, D), "lengths": lengths}
        if paged:
            pages = -(-N // 16)
            table = torch.randperm(3 * pages, generator=torch.Generator().manual_seed(0))
            inputs["page_table"] = table.view(3, pages).to(device=device, dtype=torch.int32)
            return inputs | {name: randn(3 * pages, H_kv, 16, D) for name in ("k_cache", "v_cache")}
        return inputs | {name: randn(3, H_kv, N, D) for name in ("k_cache", "v_cache")}

    def run(backend: str, **inputs: Any) -> dict[str, Tensor]:
        out, lse = lmkern.cached_attention(**inputs, return_lse=True, backend=backend)
        return {"out": out, "lse": lse}

    return Op("cached_attention", f"{name}-H{H}of{H_kv}-N{N}-D{D}", make, run)


def norm(op: str, R: int, E: int, **options: Any) -> Op:
    names = {"layer_norm": ("x", "weight", "bias"), "rms_norm": ("x", "weight")}.get(
        op, ("x", "residual", "weight", "bias")
    )
    cotangents = ("dy", "dh") if op == "add_norm" else ("dy",)

    def make(dtype: torch.dtype, device: str) -> dict[str, Any]:
        randn = seeded_randn(0, dtype, device)
        return {
            name: randn(E) if name in ("weight", "bias") else randn(R, E) for name in (*names, *cotangents)
        }

    def run(backend: str, **inputs: Any) -> dict[str, Tensor]:
        def call(x: Tensor, weight: Tensor, **others: Tensor) -> Any:
            if op == "add_norm":
                seed = {"dropout_seed": torch.tensor(3, device=x.device)} if "dropout_p" in options else {}
                return lmkern.add_norm(x, weight=weight, **others, **options, **seed, backend=backend)
            return getattr(lmkern, op)(x, (E,), weight, **others, **options, backend=backend)

        return with_gradients(call, cotangents, **inputs)

    return Op(op, f"R{R}-E{E}{'-dropout' if options.get('dropout_p') else ''}", make, run)


def loss(op: str, R: int, V: int, E: int = 0, **options: Any) -> Op:
    def make(dtype: torch.dtype, device: str) -> dict[str, Any]:
        randn = seeded_randn(0, dtype, device)
        targets = torch.randint(V, (R,), generator=torch.Generator().manual_seed(0)).to(device)
        targets[::7] = -100
        if op == "cross_entropy":
            return {"logits": randn(R, V), "targets": targets}
        return {"x": randn(R, E), "weight": randn(V, E) / E**0.5, "targets": targets}

    def run(backend: str, **inputs: Any) -> dict[str, Tensor]:
        return with_gradients(lambda **x: getattr(lmkern, op)(**x, **options, backend=backend), (), **inputs)

    return Op(op, f"R{R}-V{V}{'-options' if options else ''}", make, run)


def rotary(interleaved: bool) -> Op:
    def make(dtype: torch.dtype, device: str) -> dict[str, Any]:
        randn = seeded_randn(0, dtype, device)
        angles = torch.outer(torch.arange(77.0), 10000.0 ** -torch.arange(0, 1, 1 / 16)).to(device)
        return {"x": randn(2, 3, 77, 40), "dy": randn(2, 3, 77, 40), "angles": angles}

    def run(backend: str, x: Tensor, dy: Tensor, angles: Tensor) -> dict[str, Tensor]:
        def call(x: Tensor) -> Any:
            tables = (angles.cos().float(), angles.sin().float())
            return lmkern.rotary(x, *tables, interleaved=interleaved, backend=backend)

        return with_gradients(call, ("dy",), x=x, dy=dy)

    return Op("rotary", "interleaved" if interleaved else "halves", make, run)


def activation(function: str, R: int, F: int) -> Op:
    gated = function in ("swiglu", "geglu")

    def make(dtype: torch.dtype, device: str) -> dict[str, Any]:
        randn = seeded_randn(0, dtype, device)
        width = 2 * F if gated else F
        return {"x": randn(R, width), "bias": randn(width), "dy": randn(R, F)}

    def run(backend: str, **inputs: Any) -> dict[str, Tensor]:
        return with_gradients(lambda **x: getattr(lmkern, function)(**x, backend=backend), ("dy",), **inputs)

    return Op("activation", f"{function}-R{R}-F{F}", make, run)


def embedding(N: int, V: int, E: int) -> Op:
    def make(dtype: torch.dtype, device: str) -> dict[str, Any]:
        randn = seeded_randn(0, dtype, device)
        tokens = torch.randint(V, (N,), generator=torch.Generator().manual_seed(0)) % max(V // 3, 1)
        return {"tokens": tokens.to(device), "weight": randn(V, E), "dy": randn(N, E)}

    def run(backend: str, **inputs: Any) -> dict[str, Tensor]:
        return with_gradients(lambda **x: lmkern.embedding(**x, backend=backend), ("dy",), **inputs)

    return Op("embedding", f"N{N}-V{V}-E{E}", make, run)


def adamw() -> Op:
    def make(dtype: torch.dtype, device: str) -> dict[str, Any]:
        randn = seeded_randn(0, dtype, device)
        state = {name: randn(333, 77) for name in ("param", "grad", "exp_avg")}
        return state | {"exp_avg_sq": randn(333, 77).abs()}

    def run(backend: str, **inputs: Tensor) -> dict[str, Tensor]:
        state = {name: x.clone() for name, x in inputs.items()}
        options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 3}
        lmkern.adamw_(**state, **options, grad_scale=0.5, backend=backend)
        return {name: state[name] for name in ("param", "exp_avg", "exp_avg_sq")}

    return Op("adamw", "R333-C77", make, run, (FP32,))


def transposed_copy() -> Op:
    def run(backend: str, x: Tensor) -> dict[str, Tensor]:
        return {"y": lmkern.transposed_copy(x, backend=backend)}

    return Op("copy", "transposed", lambda dtype, device: {"x": seeded_randn(0, dtype, device)(333, 77)}, run)


SQUARE = AttentionShape(2, 4, 200, 64, 200, 2, True)
OPS = (
    attention("square", SQUARE),
    attention("wide", AttentionShape(1, 4, 300, 128, 300, 4, True)),
    attention("ragged", AttentionShape(2, 4, 129, 80, 257, 2, True), layout="transposed"),
    attention("full", AttentionShape(1, 2, 100, 256, 130, 2, False)),
    attention("few", AttentionShape(2, 4, 5, 64, 300, 2, True)),
    attention("narrow", AttentionShape(1, 2, 77, 16, 91, 1, False)),
    attention("window", SQUARE, AttentionFeatures(window=(30, 5))),
    attention("bias", SQUARE, AttentionFeatures(bias="Hqk", mask="Bk")),
    attention("relative", SQUARE, AttentionFeatures(relative_bias="H", alibi=True)),
    attention("capped", SQUARE, AttentionFeatures(softcap=2.0, sinks=True)),
    attention("dropout", SQUARE, AttentionFeatures(dropout_p=0.25)),
    attention(
        "packed",
        AttentionShape(1, 4, 200, 64, 200, 2, True),
        AttentionFeatures(documents=((60, 60), (0, 0), (140, 140))),
    ),
    cached("plain", 8, 2, 3000, 128, paged=False),
    cached("paged", 8, 8, 700, 64, paged=True),
    *(norm("layer_norm", R, E) for R, E in ((1000, 128), (37, 768), (33, 8192), (9, 20_000), (3, 70_001))),
    *(norm("rms_norm", R, E) for R, E in ((1000, 128), (33, 4096), (3, 70_000))),
    *(norm("add_norm", R, E, dropout_p=0.1) for R, E in ((37, 768), (33, 8192), (3, 70_000))),
    norm("add_norm", 65, 1000),
    loss("cross_entropy", 65, 50_257),
    loss("cross_entropy", 65, 1000, label_smoothing=0.1, z_loss=1e-4, softcap=30.0),
    loss("linear_cross_entropy", 300, 5000, 96),
    loss("linear_cross_entropy", 70, 1000, 65, label_smoothing=0.1, z_loss=1e-4, softcap=30.0),
    rotary(False),
    rotary(True),
    *(activation(function, 333, 1000) for function in ("gelu", "swiglu", "geglu")),
    embedding(2000, 500, 333),
    adamw(),
    transposed_copy(),
)


def parameters(*, dtypes: bool, of: tuple[Op, ...] = OPS) -> list[Any]:
    """(op, backend, dtype), with ids that begin with the op; backends that cannot run say why."""
    found = []
    for op in of:
        for backend in (name for name in backends.backend_names(op.op) if name in GPU_BACKENDS):
            reason = backends.load(op.op, backend).unavailable()
            marks = [pytest.mark.skipif(reason is not None, reason=str(reason))]
            for dtype in op.dtypes if dtypes else op.dtypes[:1]:
                name = f"{op}-{backend}-{str(dtype).removeprefix('torch.')}"
                found.append(pytest.param(op, backend, dtype, id=name, marks=marks))
    return found


def results(op: Op, backend: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The op's results; skips a call that the backend refuses with a reason."""
    try:
        return op.run(backend, **inputs)
    except backends.UnsupportedBackend as error:
        pytest.skip(str(error))


def exact(op: Op, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The reference's results in float64 for the same inputs."""
    wide = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    return op.run("reference", **wide)


def assert_close(name: str, ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert ours.shape == exact.shape, name
    assert torch.equal(ours.isfinite(), exact.isfinite()), f"{name}: not finite in other places"
    ours, exact = (torch.where(exact.isfinite(), x.double(), 0) for x in (ours, exact))
    size = exact.norm()
    error = float((ours - exact).norm() / size) if size else float(ours.norm())
    assert error <= TOLERANCE[dtype], f"{name}: off by {error:.2e} of the norm"


@pytest.mark.parametrize(("op", "backend", "dtype"), parameters(dtypes=True))
def test_results_are_those_of_float64_from_poisoned_memory(op: Op, backend: str, dtype: torch.dtype) -> None:
    inputs = op.make(dtype, DEVICE)
    with poisoned_memory():
        ours = results(op, backend, inputs)
    wanted = exact(op, inputs)
    assert ours.keys() == wanted.keys()
    for name, result in ours.items():
        assert_close(name, result, wanted[name], dtype)


@pytest.mark.parametrize(("op", "backend", "dtype"), parameters(dtypes=False))
def test_ten_times_the_same_bits(op: Op, backend: str, dtype: torch.dtype) -> None:
    inputs = op.make(dtype, DEVICE)
    first = results(op, backend, inputs)
    for _ in range(REPEATS - 1):
        for name, again in op.run(backend, **inputs).items():
            assert torch.equal(bits(again), bits(first[name])), f"{name}: other bits the second time"


def bits(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)


CHECKED = tuple(
    next(op for op in OPS if op.op == name)
    for name in ("attention", "cached_attention", "layer_norm", "add_norm", "cross_entropy", "embedding")
)


@pytest.mark.memory_checked
@pytest.mark.parametrize(("op", "backend", "dtype"), parameters(dtypes=False, of=CHECKED))
def test_memory_is_read_and_written_in_bounds(op: Op, backend: str, dtype: torch.dtype) -> None:
    """What `make gpu` runs under compute-sanitizer; without it the call alone must not fail."""
    results(op, backend, op.make(dtype, DEVICE))
    synchronize()


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_first_call_of_a_thread_attention(backend: str) -> None:
    """A thread that has called nothing of CUDA has no context until it is given one."""
    usable("attention", backend)
    q = seeded_randn(0, BF16, DEVICE)(1, 2, 300, 64)
    expected = lmkern.attention(q, q, q, causal=True, backend=backend)
    synchronize()
    with ThreadPoolExecutor(1) as pool:
        out = pool.submit(lmkern.attention, q, q, q, causal=True, backend=backend).result()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_more_than_2_31_elements_norm(op: str, backend: str) -> None:
    """The last rows of a tensor whose offsets need 64 bits are those of the same rows alone."""
    usable(op, backend)
    R, E = LARGE_ROWS, 4096
    x = torch.zeros(R, E, dtype=BF16, device=DEVICE)
    x[-3:] = seeded_randn(0, BF16, DEVICE)(3, E)
    weight = torch.ones(E, dtype=BF16, device=DEVICE)
    large, small = leaves(x)[0], leaves(x[-3:].clone())[0]
    found = []
    for rows in (large, small):
        y = getattr(lmkern, op)(rows, (E,), weight, backend=backend)
        found.append((y, *torch.autograd.grad(y, rows, rows.detach())))
    for of_large, of_small in zip(*found, strict=True):
        assert torch.equal(of_large[-3:], of_small)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_more_than_2_31_elements_attention(backend: str) -> None:
    usable("attention", backend)
    # As a model holds them: heads of a token side by side.
    B, N, H, D = LARGE_BATCH, 256, 32, 128
    q = torch.zeros(B, N, H, D, dtype=BF16, device=DEVICE)
    q[-1] = seeded_randn(0, BF16, DEVICE)(N, H, D)
    large = leaves(q.transpose(1, 2))[0]
    found = []
    for x in (large, leaves(large[-1:].contiguous())[0]):
        out = lmkern.attention(x, x, x, causal=True, backend=backend)
        found.append((out, *torch.autograd.grad(out, x, x.detach())))
    for of_large, of_small in zip(*found, strict=True):
        assert torch.equal(of_large[-1:], of_small)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_more_than_2_31_elements_cross_entropy(backend: str) -> None:
    usable("cross_entropy", backend)
    R, V = LARGE_ROWS // 32, 131_072
    logits = torch.zeros(R, V, dtype=BF16, device=DEVICE)
    logits[-2:] = seeded_randn(0, BF16, DEVICE)(2, V)
    targets = torch.arange(R, device=DEVICE) % V
    losses = lmkern.cross_entropy(logits, targets, reduction="none", backend=backend)
    alone = lmkern.cross_entropy(logits[-2:].clone(), targets[-2:], reduction="none", backend=backend)
    assert torch.equal(losses[-2:], alone)


DEVICE = "cuda"
# Rows of 4,096 columns, and sequences of 2^20 elements, that are more than 2^31 elements.
LARGE_ROWS, LARGE_BATCH = 2**19 + 32, 2**11 + 1


def usable(op: str, backend: str) -> None:
    if backend not in backends.backend_names(op):
        pytest.skip(f"{op} has no backend {backend}")
    if reason := backends.load(op, backend).unavailable():
        pytest.skip(reason)
