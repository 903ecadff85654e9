"""The compiled CPU modules: choice of instruction set, the packed call, forks and threads."""

import importlib
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import lmkern
from lmkern.kernels import backends, native
from lmkern.testing import AttentionShape, attention_inputs

OPS = [op for op in backends.op_names() if "cpu" in backends.backend_names(op)]


def passes(op: str) -> tuple[str, ...]:
    return getattr(importlib.import_module(f"lmkern.kernels.{op}"), "PASSES", ("forward", "backward"))


ENTRY_POINTS = [(op, name) for op in OPS for name in passes(op)]

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
@pytest.mark.parametrize(("op", "entry"), ENTRY_POINTS)
def test_packed_call_has_the_size_that_was_compiled(op: str, entry: str, name: str) -> None:
    module = native.cpu_modules().get(name)
    if module is None:
        pytest.skip(f"this processor has no {name}")
    params: struct.Struct = importlib.import_module(f"lmkern.kernels.{op}.cpu")._PARAMS
    function = getattr(module, f"{op}_{entry}")
    for size in (0, params.size - 8, params.size + 8):
        with pytest.raises(ValueError, match="does not match the compiled module; rebuild it"):
            function(bytes(size))


def attention_call() -> tuple[torch.Tensor, ...]:
    q, k, v, dout = attention_inputs(AttentionShape(2, 4, 150, 16, 150, 4, causal=True))
    q.requires_grad_()
    out = lmkern.attention(q, k, v, causal=True, backend="cpu")
    return out.detach(), *torch.autograd.grad(out, q, dout)


def cached_attention_call() -> tuple[torch.Tensor, ...]:
    q, k, v, _ = attention_inputs(AttentionShape(2, 4, 1, 16, 1500, 4, causal=True))
    return tuple(lmkern.cached_attention(q, k, v, return_lse=True, backend="cpu"))


def layer_norm_call() -> tuple[torch.Tensor, ...]:
    _, _, _, x = attention_inputs(AttentionShape(2, 4, 150, 16, 150, 4, causal=True))
    weight = torch.ones(16, requires_grad=True)
    y = lmkern.layer_norm(x, (16,), weight, backend="cpu")
    return y.detach(), *torch.autograd.grad(y, weight, x)


# Of each op a call with work for two threads, forward and backward; every op has one.
CALLS = {
    "attention": attention_call,
    "cached_attention": cached_attention_call,
    "layer_norm": layer_norm_call,
}


def results() -> tuple[torch.Tensor, ...]:
    return tuple(result for call in CALLS.values() for result in call())


def test_every_op_is_called_here() -> None:
    assert list(CALLS) == OPS, "give the new op a line in CALLS"


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux lists them")
def test_one_thread_means_one_thread() -> None:
    code = (
        "import os, torch; torch.set_num_threads(1)\n"
        "from tests.kernels.test_native import results\n"
        "before = len(os.listdir('/proc/self/task')); results()\n"
        "raise SystemExit(len(os.listdir('/proc/self/task')) - before)"
    )
    # The autograd engine has a thread of its own only for other devices than the CPU.
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=os.environ | {"PYTHONPATH": str(root)})
    assert done.returncode == 0, f"{done.returncode} threads were started"


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
