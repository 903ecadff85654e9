"""The CPU kernels on ARM: compiled for AArch64, run under emulation, equal to this machine's baseline.

Calls of every entry point are recorded as they reach the baseline module, made again by
tests/csrc/replay.cpp, and each of their buffers must then hold the same numbers.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import lmkern
from lmkern.kernels import native
from lmkern.testing import (
    AttentionFeatures,
    AttentionShape,
    CrossEntropyShape,
    LayerNormShape,
    attention_inputs,
    attention_options,
    attention_results,
    cross_entropy_inputs,
    layer_norm_inputs,
    layer_norm_results,
    leaves,
    our_attention,
    poisoned_memory,
    seeded_randn,
)
from lmkern.testing.error_budget import unit_in_last_place

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "aarch64"
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# In the last place of a buffer's largest element. Everything is bit-equal but what calls the C library, which
# fuses products on ARM.
UNITS_OF_FLOAT64 = 1.0


@dataclass(slots=True)
class Buffer:
    """The memory of one tensor's storage, before a call and after it."""

    address: int
    dtype: torch.dtype
    before: bytes
    after: bytes = b""


@dataclass(slots=True)
class RecordedCall:
    name: str
    params: bytes
    buffers: list[Buffer]
    about: str


@dataclass(slots=True)
class Recorder:
    """In the place of a compiled module, to which it passes every call on."""

    module: ModuleType
    calls: list[RecordedCall] = field(default_factory=list)
    about: str = ""
    # Of the tensors whose address was asked for since the last call.
    storages: dict[int, tuple[torch.dtype, int]] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Callable[[bytes], None]:
        return lambda params: self.call(name, params)

    def call(self, name: str, params: bytes) -> None:
        fields = struct.unpack(f"={len(params) // 8}q", params)
        buffers = [
            Buffer(address, dtype, ctypes.string_at(address, size))
            for address, (dtype, size) in self.storages.items()
            if any(address <= value < address + size for value in fields)
        ]
        getattr(self.module, name)(params)
        for buffer in buffers:
            buffer.after = ctypes.string_at(buffer.address, len(buffer.before))
        self.calls.append(RecordedCall(name, params, buffers, self.about))
        self.storages.clear()


@contextmanager
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    recorder = Recorder(native.cpu_modules()["baseline"])
    address_of = torch.Tensor.data_ptr

    def noted(tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        recorder.storages[storage.data_ptr()] = tensor.dtype, storage.nbytes()
        return address_of(tensor)

    with monkeypatch.context() as patched, poisoned_memory():
        patched.setattr(torch.Tensor, "data_ptr", noted)
        patched.setattr(native, "instruction_set", lambda: "baseline")
        patched.setattr(native, "function", lambda name, dtype: getattr(recorder, name))
        yield recorder


def backward(y: Tensor, *inputs: Tensor) -> None:
    torch.autograd.grad(y, inputs, torch.randn_like(y))


def call_attention(dtype: torch.dtype) -> None:
    every = AttentionFeatures(
        window=(40, 3), softcap=3.0, bias="Hqk", mask="BHqk", relative_bias="H", alibi=True, sinks=True,
        dropout_p=0.5,
    )  # fmt: skip
    documents = AttentionFeatures(documents=((37, 50), (0, 3), (30, 20)))
    for shape, features in (
        (AttentionShape(1, 2, 67, 33, 70, 2, causal=True), AttentionFeatures()),
        (AttentionShape(2, 4, 37, 40, 50, 2, causal=False), every),
        (AttentionShape(1, 2, 67, 16, 73, 1, causal=True), documents),
        (AttentionShape(1, 1, 300, 8, 300, 1, causal=True), AttentionFeatures(alibi=True)),
    ):
        inputs = attention_inputs(shape, dtype, layout="sliced")
        options = attention_options(shape, features, dtype)
        attention_results(our_attention(shape, "cpu"), *inputs, options=options)
    peaky = AttentionShape(1, 2, 40, 16, 40, 2, causal=True)
    attention_results(our_attention(peaky, "cpu"), *attention_inputs(peaky, dtype, q_factor=64.0))


def call_cached_attention(dtype: torch.dtype) -> None:
    randn = seeded_randn(0, dtype)
    q, k, v = randn(2, 4, 3, 40), randn(2, 2, 600, 40), randn(2, 2, 600, 40)
    lengths = torch.tensor([600, 77])
    lmkern.cached_attention(q, k, v, lengths=lengths, backend="cpu")
    pages = torch.randperm(10).view(2, 5)
    k, v = (x.view(2, 2, 5, 120, 40).transpose(1, 2).reshape(10, 2, 120, 40) for x in (k, v))
    options: dict[str, Any] = {"softcap": 2.0, "sinks": torch.randn(4), "alibi_slopes": torch.rand(4)}
    lmkern.cached_attention(
        q, k, v, lengths=lengths, page_table=pages, window=(90, 0), **options, backend="cpu"
    )


def call_norms(dtype: torch.dtype) -> None:
    for parameter_dtype in {dtype, torch.promote_types(dtype, torch.float32)}:
        for shape in (LayerNormShape(37, 65), LayerNormShape(5, 3)):
            x, weight, bias, dy = layer_norm_inputs(shape, dtype, parameter_dtype=parameter_dtype)
            layer_norm_results(
                lambda x, weight, bias: lmkern.layer_norm(x, x.shape[-1:], weight, bias, backend="cpu"),
                x, weight, bias, dy,
            )  # fmt: skip
            x, weight, residual = leaves(x, weight, dy)
            backward(lmkern.rms_norm(x, x.shape[-1:], weight, offset=1.0, backend="cpu"), x, weight)
            y, h = lmkern.add_norm(
                x, residual, weight, dropout_p=0.3, dropout_seed=torch.tensor(77), backend="cpu"
            )
            torch.autograd.grad((y, h), (x, residual, weight), (torch.randn_like(y), torch.randn_like(h)))


def call_cross_entropy(dtype: torch.dtype) -> None:
    for shape in (CrossEntropyShape(9, 65), CrossEntropyShape(3, 5003)):
        logits, targets, _ = cross_entropy_inputs(shape, dtype)
        logits = leaves(logits)[0]
        for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}):
            backward(
                lmkern.cross_entropy(logits, targets, reduction="none", **options, backend="cpu"), logits
            )


def call_activations(dtype: torch.dtype) -> None:
    randn = seeded_randn(0, dtype)
    # The largest subnormal numbers: zero in a kernel.
    tiny = torch.full((4,), torch.finfo(dtype).tiny * 0.99, dtype=dtype)
    for function in ("gelu", "gelu_tanh", "silu", "relu", "relu_squared"):
        for gated in (False, True):
            x, bias = leaves(randn(21, 66) * 3, randn(66))
            backward(lmkern.activation(x, bias, function, gated=gated, backend="cpu"), x, bias)
        backward(lmkern.activation(x := leaves(tiny)[0], None, function, backend="cpu"), x)


def call_embedding_and_rotary(dtype: torch.dtype) -> None:
    randn = seeded_randn(0, dtype)
    weight, x = leaves(randn(11, 33), randn(2, 3, 17, 40))
    backward(lmkern.embedding(torch.randint(11, (5, 7)), weight, padding_idx=2, backend="cpu"), weight)
    angles = torch.randn(30, 16)
    for interleaved in (False, True):
        backward(
            lmkern.rotary(x, angles.cos(), angles.sin(), interleaved=interleaved, offset=3, backend="cpu"), x
        )


def call_linear(dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        return
    randn = seeded_randn(0, dtype)
    for K in (37, 128):
        lmkern.linear(randn(4, K), randn(70, K), randn(70), backend="cpu")


def call_adamw(dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    param, grad = torch.randn(1001, dtype=dtype), torch.randn(1001, dtype=dtype)
    moments = torch.randn(1001, dtype=wide), torch.rand(1001, dtype=wide)
    copy = torch.empty(1001, dtype=torch.bfloat16) if dtype == torch.float32 else None
    lmkern.adamw_(
        param, grad, *moments, lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=3,
        grad_scale=0.7, copy=copy, backend="cpu",
    )  # fmt: skip


def call_copies(dtype: torch.dtype) -> None:
    # Every bit pattern of 16 bits: subnormals, infinities and NaN too.
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(256, 256)
    x = patterns.view(dtype) if dtype.itemsize == 2 else torch.randn(256, 256, dtype=dtype) * 3e4
    for to in DTYPES if dtype == torch.float32 else (dtype, torch.float32):
        lmkern.cast(x, to, backend="cpu")
        lmkern.transposed_copy(x[:67, :35], to, backend="cpu")
    if dtype == torch.float32:
        # Around every float16 that is subnormal, and the ties between them.
        small = torch.arange(2**13, dtype=dtype) * 2.0**-26
        lmkern.cast(torch.cat((small, -small)), torch.float16, backend="cpu")


CALLS = (
    call_attention,
    call_cached_attention,
    call_norms,
    call_cross_entropy,
    call_activations,
    call_embedding_and_rotary,
    call_linear,
    call_adamw,
    call_copies,
)


def test_on_aarch64_every_entry_point_gives_what_it_gives_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if COMPILER is None or EMULATOR is None:
        pytest.skip("no AArch64 compiler or emulator: apt install g++-aarch64-linux-gnu qemu-user-static")
    if platform.machine() != "x86_64":
        pytest.skip("compares with x86-64's baseline")
    with recording(monkeypatch) as recorder:
        for dtype in DTYPES:
            for call in CALLS:
                recorder.about = f"{call.__name__.removeprefix('call_')} {dtype}"
                call(dtype)
    entry_points = {name for name in dir(recorder.module) if name.endswith(("ward", "step"))}
    assert {call.name for call in recorder.calls} == entry_points
    verdicts = [
        f"{call.about}, {call.name}, buffer {number}: {verdict}"
        for call, results in zip(recorder.calls, replayed(recorder.calls, tmp_path), strict=True)
        for number, (buffer, result) in enumerate(zip(call.buffers, results, strict=True))
        if (verdict := difference(buffer, result)) is not None
    ]
    assert not verdicts, "\n".join(verdicts)


def replayed(calls: list[RecordedCall], folder: Path) -> Iterator[list[bytes]]:
    """What the buffers of each call hold after it on AArch64."""
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", "-DLMKERN_MODULES=replay",
        "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", str(BUILD)]):
        run(command)
    recorded, results = folder / "recorded", folder / "results"
    recorded.write_bytes(b"".join(map(serialised, calls)))
    run([str(EMULATOR), str(BUILD / "replay"), str(recorded), str(results)])
    with results.open("rb") as file:
        for call in calls:
            yield [file.read(len(buffer.after)) for buffer in call.buffers]
        assert not file.read()


def run(command: list[str]) -> None:
    done = subprocess.run(command, env={**os.environ, "PATH": TOOLS}, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"


def serialised(call: RecordedCall) -> bytes:
    """As tests/csrc/replay.cpp reads it."""

    def sized(data: bytes) -> bytes:
        return struct.pack("=q", len(data)) + data

    buffers = [struct.pack("=q", buffer.address) + sized(buffer.before) for buffer in call.buffers]
    count = struct.pack("=q", len(buffers))
    return sized(call.name.encode()) + sized(call.params) + count + b"".join(buffers)


def difference(buffer: Buffer, result: bytes) -> str | None:
    """How the result is not what the buffer held here, in words; None if it is."""
    if buffer.after == result:
        return None
    here, there = (torch.frombuffer(bytearray(x), dtype=buffer.dtype) for x in (buffer.after, result))
    if not buffer.dtype.is_floating_point:
        return f"{int((here != there).sum())} of {here.numel()} integers differ"
    finite = here.isfinite()
    same = (here == there) | (here.isnan() & there.isnan())
    if not (finite == there.isfinite()).all() or not same[~finite].all():
        return "infinities or NaN elsewhere"
    size = float(here[finite].abs().max().double()) if finite.any() else 0.0
    units = float((here[finite].double() - there[finite].double()).abs().max())
    units /= unit_in_last_place(size, buffer.dtype)
    allowed = UNITS_OF_FLOAT64 if buffer.dtype == torch.float64 else 0.0
    return None if units <= allowed else f"{units:.3g} units in the last place of {size:.3g} apart"
