"""The compiled CPU modules: choice of instruction set, the packed call, forks and threads."""

import importlib
import os
import signal
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import lmkern
from lmkern.kernels import native
from lmkern.testing import AttentionShape, attention_inputs

OPS = ("attention", "cross_entropy", "layer_norm")
ENTRY_POINTS = [(op, f"{op}_{name}", "_PARAMS") for op in OPS for name in ("forward", "backward")]
# In the module for AMX alone.
ENTRY_POINTS += [
    ("linear_cross_entropy", "input_gradient", "_INPUT_PARAMS"),
    ("linear_cross_entropy", "weight_gradient_add", "_WEIGHT_PARAMS"),
    ("linear_cross_entropy", "weight_gradient_store", "_WEIGHT_PARAMS"),
]

# Seconds; a hang, not a slow machine.
PATIENCE = 60


@pytest.fixture
def chosen_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The choice of a module is made afresh within the test, and after it."""
    native.module.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    native.module.cache_clear()


def test_the_best_instruction_set_is_chosen(chosen_again: pytest.MonkeyPatch) -> None:
    chosen_again.delenv("LMKERN_CPU_ISA", raising=False)
    modules = native.cpu_modules()
    assert list(modules) == [name for name in native.INSTRUCTION_SETS if name in modules]
    assert "baseline" in modules
    assert native.module() is next(iter(modules.values()))


@pytest.mark.parametrize("name", native.INSTRUCTION_SETS)
def test_an_instruction_set_can_be_forced(name: str, chosen_again: pytest.MonkeyPatch) -> None:
    chosen_again.setenv("LMKERN_CPU_ISA", name)
    if name in native.cpu_modules():
        assert native.module().__name__.endswith(f"_cpu_{name}")
    else:
        with pytest.raises(ValueError, match=f"instruction set of this machine .*; got '{name}'"):
            native.module()


def test_an_unknown_instruction_set_is_refused(chosen_again: pytest.MonkeyPatch) -> None:
    chosen_again.setenv("LMKERN_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match=r"LMKERN_CPU_ISA: expected .*baseline.*; got 'mmx'"):
        native.module()


@pytest.mark.parametrize("name", native.INSTRUCTION_SETS)
@pytest.mark.parametrize(("op", "entry", "layout"), ENTRY_POINTS)
def test_packed_call_has_the_size_that_was_compiled(op: str, entry: str, layout: str, name: str) -> None:
    module = native.cpu_modules().get(name)
    if module is None:
        pytest.skip(f"this processor has no {name}")
    if op == "linear_cross_entropy" and name != "amx":
        assert not hasattr(module, entry)
        return
    params: struct.Struct = getattr(importlib.import_module(f"lmkern.kernels.{op}.cpu"), layout)
    function = getattr(module, entry)
    for size in (0, params.size - 8, params.size + 8):
        with pytest.raises(ValueError, match="does not match the compiled module; rebuild it"):
            function(bytes(size))


def results() -> tuple[torch.Tensor, ...]:
    """Forward and backward of both ops, on two threads."""
    shape = AttentionShape(2, 4, 150, 16, 150, 4, causal=True)
    q, k, v, dout = attention_inputs(shape)
    q.requires_grad_()
    out = lmkern.attention(q, k, v, causal=True, backend="cpu")
    (dq,) = torch.autograd.grad(out, q, dout)
    weight = torch.ones(16, requires_grad=True)
    y = lmkern.layer_norm(dout, (16,), weight, backend="cpu")
    (dweight,) = torch.autograd.grad(y, weight, dout)
    return out.detach(), dq, y.detach(), dweight


# Python 3.12 warns of what is tried here.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_child_computes_and_does_not_hang() -> None:
    # The parent's pool runs before the fork: its threads are what a child does not inherit.
    expected = results()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            mine = results()
            status = 0 if all(map(torch.equal, mine, expected)) else 2
        finally:
            os._exit(status)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("a forked child hangs in the CPU kernels")
    assert all(map(torch.equal, results(), expected))


def test_python_threads_may_call_at_the_same_time() -> None:
    expected = results()
    with ThreadPoolExecutor(4) as pool:
        for mine in pool.map(lambda _: results(), range(24)):
            # A fresh Python thread has a thread count of its own, which may share out the work otherwise.
            for a, b in zip(mine, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
