"""The compiled CPU modules: choice of instruction set, the packed call, forks and threads."""

import importlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch

import lmkern
from lmkern.cli.main import main
from lmkern.kernels import backends, native, norm_call
from lmkern.kernels.activation import cpu as activation
from lmkern.kernels.adamw import cpu as adamw
from lmkern.kernels.attention import cpu as attention
from lmkern.kernels.cached_attention import cpu as cached_attention
from lmkern.kernels.copy import cpu as copy
from lmkern.kernels.cross_entropy import cpu as cross_entropy
from lmkern.kernels.embedding import cpu as embedding
from lmkern.kernels.linear import cpu as linear
from lmkern.kernels.linear_cross_entropy import bf16 as linear_cross_entropy
from lmkern.kernels.rotary import cpu as rotary_cpu
from lmkern.testing import AttentionShape, attention_inputs

Call = Callable[[], tuple[torch.Tensor, ...]]

OPS = [op for op in backends.op_names() if "cpu" in backends.backend_names(op)]


# Every entry point that takes a packed call, and the struct in Python that packs it.
ENTRY_POINTS = {
    "activation_forward": activation._PARAMS,
    "activation_backward": activation._PARAMS,
    "adamw_step": adamw._PARAMS,
    "attention_forward": attention._PARAMS,
    "attention_backward": attention._PARAMS,
    "cached_attention_forward": cached_attention._PARAMS,
    "copy_forward": copy._PARAMS,
    "cross_entropy_forward": cross_entropy._PARAMS,
    "cross_entropy_backward": cross_entropy._PARAMS,
    "embedding_forward": embedding._PARAMS,
    "embedding_backward": embedding._PARAMS,
    "linear_forward": linear._PARAMS,
    "linear_input_gradient": linear_cross_entropy.PARAMS,
    "linear_logits": linear_cross_entropy.PARAMS,
    "linear_weight_gradient_add": linear_cross_entropy.PARAMS,
    "linear_weight_gradient_store": linear_cross_entropy.PARAMS,
    "norm_forward": norm_call.PARAMS,
    "norm_backward": norm_call.PARAMS,
    "rotary_forward": rotary_cpu._PARAMS,
}
PAIRS = {name for name, packed in ENTRY_POINTS.items() if packed is linear_cross_entropy.PARAMS}
TILES = PAIRS | {"attention_forward", "attention_backward"}
NO_ROUNDING = {"cached_attention_forward", "embedding_forward", "embedding_backward", "linear_forward"}
# What a module has.
ENTRIES = {"amx": TILES, "avx512_bf16": set(ENTRY_POINTS) - NO_ROUNDING}


def entries(name: str) -> set[str]:
    return ENTRIES.get(name, set(ENTRY_POINTS) - PAIRS)


# Seconds; a hang, not a slow machine.
PATIENCE = 60


@pytest.fixture
def chosen_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The choice of a module is made afresh within the test, and after it."""
    native.instruction_set.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    native.instruction_set.cache_clear()


def test_the_best_instruction_set_is_chosen(chosen_again: pytest.MonkeyPatch) -> None:
    chosen_again.delenv("LMKERN_CPU_ISA", raising=False)
    modules = native.cpu_modules()
    assert list(modules) == [name for name in native.INSTRUCTION_SETS if name in modules]
    assert "baseline" in modules
    assert native.instruction_set() == next(iter(modules))


@pytest.mark.parametrize("name", native.INSTRUCTION_SETS)
def test_an_instruction_set_can_be_forced(name: str, chosen_again: pytest.MonkeyPatch) -> None:
    chosen_again.setenv("LMKERN_CPU_ISA", name)
    if name in native.cpu_modules():
        assert native.instruction_set() == name
        below = list(native.cpu_modules())[list(native.cpu_modules()).index(name) :]
        for kernel in set(ENTRY_POINTS) - PAIRS:
            served = [dtype for dtype in native.DTYPE_CODES if native.serves(name, kernel, dtype)]
            assert bool(served) == (kernel in entries(name))
            for dtype in native.DTYPE_CODES:
                chosen = next(isa for isa in below if native.serves(isa, kernel, dtype))
                assert chosen == name or dtype not in served
                assert native.function(kernel, dtype) is getattr(native.cpu_modules()[chosen], kernel)
    else:
        with pytest.raises(ValueError, match=f"instruction set of this machine .*; got '{name}'"):
            native.instruction_set()


def test_an_unknown_instruction_set_is_refused(chosen_again: pytest.MonkeyPatch) -> None:
    chosen_again.setenv("LMKERN_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match=r"LMKERN_CPU_ISA: expected .*baseline.*; got 'mmx'"):
        native.instruction_set()


def test_an_empty_choice_is_none(chosen_again: pytest.MonkeyPatch) -> None:
    chosen_again.setenv("LMKERN_CPU_ISA", "")
    assert native.instruction_set() == next(iter(native.cpu_modules()))
    assert native.refusal() is None


def test_doctor_says_which_module_is_used_and_who_chose_it(
    chosen_again: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(start: str) -> str:
        assert main(["doctor"]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith(start))

    chosen_again.delenv("LMKERN_CPU_ISA", raising=False)
    assert line("CPU module used").split()[3:] == [next(iter(native.cpu_modules()))]
    native.instruction_set.cache_clear()
    chosen_again.setenv("LMKERN_CPU_ISA", "baseline")
    assert line("CPU module used").split()[3:] == ["baseline", "(LMKERN_CPU_ISA)"]


def test_a_choice_that_cannot_be_met_is_the_reason_in_doctor(
    chosen_again: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen_again.setenv("LMKERN_CPU_ISA", "mmx")
    rows = [row for row in backends.describe() if row.backend == "cpu"]
    assert {row.op for row in rows} == set(OPS)
    assert all(not row.usable and row.reason.endswith("got 'mmx'") for row in rows)
    assert main(["doctor"]) == 0
    assert "CPU module used" not in capsys.readouterr().out


def test_a_module_that_cannot_be_loaded_is_named_with_the_reason(
    chosen_again: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = importlib.import_module
    best = next(iter(native.cpu_modules()))

    def broken(name: str) -> ModuleType:
        if name == f"lmkern._cpu_{best}":
            raise ImportError("undefined symbol: omp_get_thread_num")
        return loaded(name)

    chosen_again.setattr(native, "_import_errors", {})
    chosen_again.setattr(native.importlib, "import_module", broken)
    native.cpu_modules.cache_clear()
    try:
        chosen_again.setenv("LMKERN_CPU_ISA", best)
        with pytest.raises(ValueError, match=f"the module of '{best}' cannot be loaded: undefined symbol"):
            native.instruction_set()
        chosen_again.setenv("LMKERN_CPU_ISA", "")
        assert main(["doctor"]) == 0
    finally:
        chosen_again.undo()
        native.cpu_modules.cache_clear()
    shown = capsys.readouterr().out
    assert re.search(rf"^CPU module {best} +cannot be loaded: undefined symbol", shown, re.MULTILINE)


@pytest.mark.parametrize("name", native.INSTRUCTION_SETS)
def test_every_entry_point_is_known_here(name: str) -> None:
    module = native.cpu_modules().get(name)
    if module is None:
        pytest.skip(f"this processor has no {name}")
    others = {"serves", "supported_instruction_sets", "workspace_bytes"}
    assert {x for x in dir(module) if not x.startswith("_")} - others == entries(name)


@pytest.mark.parametrize("name", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_packed_call_has_the_size_that_was_compiled(entry: str, name: str) -> None:
    module = native.cpu_modules().get(name)
    if module is None:
        pytest.skip(f"this processor has no {name}")
    if entry not in entries(name):
        return
    function, size_in_python = getattr(module, entry), ENTRY_POINTS[entry].size
    for size in (0, size_in_python - 8, size_in_python + 8):
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


def rows_call(op: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]) -> Call:
    """Forward and backward of an op over rows, enough of them for two threads and too few for torch's own."""

    def call() -> tuple[torch.Tensor, ...]:
        _, _, _, x = attention_inputs(AttentionShape(2, 4, 150, 24, 150, 4, causal=True))
        x = x.detach().requires_grad_()
        y = op(x)
        y = y[0] if isinstance(y, tuple) else y
        return y.detach(), *torch.autograd.grad(y, x, torch.ones_like(y))

    return call


def adamw_call() -> tuple[torch.Tensor, ...]:
    parameter, gradient = torch.ones(20_000), torch.linspace(-1, 1, 20_000)
    first, second = torch.zeros(20_000), torch.zeros(20_000)
    lmkern.adamw_(
        parameter, gradient, first, second,
        lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=1,
    )  # fmt: skip
    return parameter, first, second


def embedding_call() -> tuple[torch.Tensor, ...]:
    weight = torch.linspace(-1, 1, 500 * 24).view(500, 24).requires_grad_()
    y = lmkern.embedding(torch.arange(1000) % 500, weight)
    return y.detach(), *torch.autograd.grad(y, weight, torch.ones_like(y))


def linear_call() -> tuple[torch.Tensor, ...]:
    x = torch.linspace(-1, 1, 2 * 500).view(2, 500)
    return (lmkern.linear(x, torch.linspace(-1, 1, 500).expand(300, 500), backend="cpu"),)


def loss_call(linear: bool) -> Call:
    def call() -> tuple[torch.Tensor, ...]:
        x = torch.linspace(-1, 1, 300 * 64).view(300, 64).requires_grad_()
        targets = torch.arange(300) % 64
        weight = torch.linspace(-1, 1, 64 * 64).view(64, 64)
        loss = lmkern.linear_cross_entropy(x, weight, targets) if linear else lmkern.cross_entropy(x, targets)
        return loss.detach(), *torch.autograd.grad(loss, x)

    return call


def rotary(x: torch.Tensor) -> torch.Tensor:
    table = torch.linspace(-1, 1, 150 * 12).view(150, 12)
    # Any numbers will do; torch's cosine would start threads of its own.
    return lmkern.rotary(x, table, table)


# Of each op a call with work for two threads, forward and backward; every op has one.
CALLS: dict[str, Call] = {
    "activation": rows_call(lmkern.gelu),
    "adamw": adamw_call,
    "add_norm": rows_call(lambda x: lmkern.add_norm(x, x.detach(), torch.ones(24), torch.zeros(24))),
    "attention": attention_call,
    "cached_attention": cached_attention_call,
    "copy": rows_call(lambda x: lmkern.cast(x, torch.bfloat16)),
    "cross_entropy": loss_call(linear=False),
    "embedding": embedding_call,
    "layer_norm": layer_norm_call,
    "linear": linear_call,
    "linear_cross_entropy": loss_call(linear=True),
    "rms_norm": rows_call(lambda x: lmkern.rms_norm(x, (24,))),
    "rotary": rows_call(rotary),
}


def results(without: str = "") -> tuple[torch.Tensor, ...]:
    return tuple(result for op, call in CALLS.items() if op != without for result in call())


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
    # Its products are torch's own, whose threads a child does not have (a DataLoader's worker uses one).
    torchs = "linear_cross_entropy"
    expected = results(torchs)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            mine = results(torchs)
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
    assert all(map(torch.equal, results(torchs), expected))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "before",
    # Each dtype may have a module of its own: the parent's pool has run, but not in the child's. Or in none.
    ["lmkern.rms_norm(x.bfloat16(), (64,), backend='cpu')", "torch.ones(1 << 20).exp()"],
)
def test_forked_child_may_be_the_first_to_call_a_module(before: str) -> None:
    code = (
        "import os, signal, torch, lmkern\n"
        "torch.set_num_threads(2); x = torch.ones(512, 64)\n"
        f"{before}\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        f"    signal.alarm({PATIENCE})\n"
        "    lmkern.rms_norm(x, (64,), backend='cpu')\n"
        "    os._exit(0)\n"
        "raise SystemExit(os.waitpid(child, 0)[1])"
    )
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env)
    assert done.returncode == 0


def test_python_threads_may_call_at_the_same_time() -> None:
    expected = results()
    with ThreadPoolExecutor(4) as pool:
        for mine in pool.map(lambda _: results(), range(24)):
            # A fresh Python thread has a thread count of its own, which may share out the work otherwise.
            for a, b in zip(mine, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
