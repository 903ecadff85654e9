"""The choice of a backend, and the reasons for each that is passed over."""

from types import ModuleType

import pytest
import torch

import lmkern
from lmkern.kernels import backends, native
from lmkern.kernels.backends import Call

OPS = backends.op_names()


def call(op: str, backend: str | None = None, dtype: torch.dtype = torch.float32, size: int = 8) -> Call:
    if op == "attention":
        x = torch.zeros(1, 1, 2, size, dtype=dtype)
        return Call(op, {"q": x, "k": x, "v": x}, {"diagonal": None, "softmax_scale": 1.0}, backend)
    return Call(op, {"x": torch.zeros(2, size, dtype=dtype), "weight": None, "bias": None}, {}, backend)


def broken(reason: str | None) -> ModuleType:
    module = ModuleType("broken")
    module.unsupported = lambda call: reason  # type: ignore[attr-defined]
    module.unavailable = lambda: reason  # type: ignore[attr-defined]
    return module


def test_the_cpu_kernels_are_built() -> None:
    assert native.cpu_unavailable() is None, native.cpu_unavailable()


def test_ops_are_the_folders_of_kernels() -> None:
    assert OPS == (
        "activation",
        "adamw",
        "add_norm",
        "attention",
        "cached_attention",
        "copy",
        "cross_entropy",
        "embedding",
        "layer_norm",
        "linear",
        "linear_cross_entropy",
        "rms_norm",
        "rotary",
    )


@pytest.mark.parametrize("op", OPS)
def test_the_fastest_that_can_is_chosen(op: str) -> None:
    chosen = backends.select(call(op))
    first = next(row.backend for row in backends.explain(call(op)) if row.usable)
    assert chosen is backends.load(op, first)
    # CPU tensors, and every kernel that takes them is faster than the reference.
    assert first == "cpu"


def test_a_call_that_a_backend_cannot_take_goes_to_the_next() -> None:
    assert backends.select(call("attention", size=257)) is backends.load("attention", "reference")


@pytest.mark.parametrize("op", OPS)
def test_explicit_backend_never_falls_back(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "load", lambda op, backend: broken("needs a cat"))
    with pytest.raises(lmkern.UnsupportedBackend, match=rf"^{op}: backend 'cpu' needs a cat\. Here: "):
        backends.select(call(op, "cpu"))


@pytest.mark.parametrize("op", OPS)
def test_explicit_backend_is_the_one_that_runs(op: str) -> None:
    for row in backends.explain(call(op, "reference")):
        if row.usable:
            assert backends.select(call(op, row.backend)) is backends.load(op, row.backend)


@pytest.mark.parametrize("op", OPS)
def test_unknown_backend_is_named_with_those_there_are(op: str) -> None:
    with pytest.raises(ValueError, match=rf"^{op}: no backend 'gpu'; expected one of .*cpu, .*reference$"):
        backends.select(call(op, "gpu"))


@pytest.mark.parametrize("op", OPS)
def test_every_gap_has_a_reason_and_the_reference_has_none(op: str) -> None:
    rows = backends.explain(call(op))
    assert [row.backend for row in rows] == list(backends.backend_names(op))
    assert all(row.usable or row.reason for row in rows)
    assert rows[-1] == backends.Support(op, "reference", True, "")


def test_description_has_a_row_for_each_op_and_backend() -> None:
    rows = backends.describe()
    assert [(row.op, row.backend) for row in rows] == [
        (op, backend) for op in OPS for backend in backends.backend_names(op)
    ]
    assert all(row.usable or row.reason for row in rows)


@pytest.mark.parametrize("op", OPS)
def test_cpu_kernels_say_which_tensor_they_do_not_take(op: str) -> None:
    cpu, first = backends.load(op, "cpu"), "q" if op == "attention" else "x"
    integers = cpu.unsupported(call(op, dtype=torch.int32))
    assert integers == f"takes float32, bfloat16, float16 and float64; {first} is torch.int32"
    there = {name: x.to("meta") for name, x in call(op).tensors.items() if x is not None}
    elsewhere = Call(op, there)
    assert cpu.unsupported(elsewhere) == f"takes CPU tensors; {first} is on meta"


def forget() -> None:
    """What is usable here is found out afresh; else all tests after this one would have the reference."""
    native.cpu_unavailable.cache_clear()
    backends._usable.cache_clear()


@pytest.mark.parametrize("op", OPS)
def test_without_compiled_modules_the_reason_is_given_and_the_reference_serves(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "cpu_modules", dict)
    monkeypatch.setattr(native, "build_failure", lambda kind: "no C++ compiler")
    forget()
    try:
        assert backends.select(call(op)) is not backends.load(op, "cpu")
        with pytest.raises(
            lmkern.UnsupportedBackend, match=r"'cpu' was not built: no C\+\+ compiler\. Here:"
        ):
            backends.select(call(op, "cpu"))
    finally:
        monkeypatch.undo()
        forget()
