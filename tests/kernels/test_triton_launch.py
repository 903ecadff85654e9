"""A launch by lmkern's own way is the launch that Triton would have made.

In a process of its own, where TRITON_INTERPRET is not set: run as a script, this file writes a JSON object to
the path it is given, the error of each check or "". Nothing is compiled and nothing runs.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import torch

# Each kernel of each case is launched with so many other arguments.
VARIATIONS = 40
INTEGERS = (-1, 0, 1, 2, 15, 16, 17, 32, 2**31 - 1, 2**31, 2**31 + 16, -(2**31), -(2**31) - 1, 2**40)
# What a launcher is given after the compiled kernel, the grid, the stream and what names the function: a
# description of the launch and the hooks that are told it, here empty.
HOOKS = (7, 8, 9)
ARCHITECTURES = ("sm_90", "gfx942")


def varied(arguments: tuple[Any, ...], chance: random.Random) -> list[Any]:
    """Arguments of the same kinds, a few of them with what Triton compiles anew for, or does not."""
    return [vary(x, chance) if chance.random() < 0.2 else x for x in arguments]


def vary(x: Any, chance: random.Random) -> Any:
    if isinstance(x, torch.Tensor):
        flat = torch.zeros(64, dtype=chance.choice((x.dtype, torch.float32, torch.bfloat16)))
        return chance.choice((flat[1:], flat[16:], flat, None))
    if isinstance(x, bool) or not isinstance(x, int):
        return x
    return chance.choice((*INTEGERS, None))


class Compared:
    """Makes each launch our way, then Triton's, and compares what the launcher was given."""

    def __init__(self) -> None:
        self.given: list[tuple[Any, ...]] = []
        self.launches: list[tuple[Any, ...]] = []
        self.kept = 0

    def launcher(self, *arguments: Any) -> None:
        self.given.append(arguments)

    def launch(
        self, original: Callable[..., Any], kernel: Any, grid: Any, *arguments: Any, **constants: Any
    ) -> Any:
        self.launches.append((kernel, grid, arguments, constants))
        known = len(kernel.compiled)
        self.given.clear()
        original(kernel, grid, *arguments, **constants)
        self.kept += len(kernel.compiled) == known
        compiled = kernel.function[grid](*arguments, **constants)
        ours, triton_s = self.given
        for place, (x, expected) in enumerate(zip(ours, triton_s, strict=True)):
            same = x is expected or (isinstance(x, (int, float, str)) and x == expected)
            assert same or place in HOOKS, (kernel.function, place, x, expected)
        return compiled


def check_launches() -> None:
    from lmkern.kernels.triton_launch import Kernel
    from lmkern.testing.offline import launching
    from lmkern.testing.triton_cases import triton_cases

    original = Kernel.launch
    for architecture in ARCHITECTURES:
        compared, chance = Compared(), random.Random(0)

        def launch(
            kernel: Any, grid: Any, *arguments: Any, _to: Compared = compared, **constants: Any
        ) -> Any:
            return _to.launch(original, kernel, grid, *arguments, **constants)

        with launching(architecture, compared.launcher), mock.patch.object(Kernel, "launch", launch):
            for case in triton_cases():
                if not case.further:
                    compared.launches.clear()
                    case.run(2, 33)
                    for kernel, grid, arguments, constants in list(compared.launches):
                        for _ in range(VARIATIONS):
                            launch(kernel, grid, *varied(arguments, chance), **constants)
        assert compared.kept > 1000, compared.kept


def check_hooks() -> None:
    """Hooks and switches that come after the first launch are seen by the second."""
    from triton import knobs

    import lmkern
    from lmkern.kernels.copy.triton_kernels import flat_kernel
    from lmkern.testing.offline import launching

    launched, before, described = [], [], []
    x = torch.zeros(64)

    def cast() -> None:
        lmkern.cast(x, torch.bfloat16, backend="triton")

    def enter(metadata: Any) -> None:
        described.append(metadata.get()["name"])

    def launcher(compiled: Any, *arguments: Any) -> None:
        launched.append(compiled)
        metadata, enter_hook, exit_hook = arguments[6:9]
        for hook in (enter_hook, exit_hook):
            if hook is not None:
                hook(metadata)

    with launching("sm_90", launcher):
        cast()
        cast()
        for hooks in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
            hooks.add(enter)
            cast()
            hooks.remove(enter)
        assert described == ["flat_kernel"] * 2, described
        flat_kernel.function.add_pre_run_hook(lambda *_, **__: before.append(1))
        cast()
        flat_kernel.function.pre_run_hooks.clear()
        assert before == [1]
        assert len(set(map(id, launched))) == 1
        with mock.patch.object(knobs.runtime, "debug", True):
            cast()
            cast()
        assert len(set(map(id, launched))) == 2
        cast()
        assert launched[-1] is launched[0]


def check_a_refused_launch_is_not_kept() -> None:
    import lmkern
    from lmkern.kernels.copy.triton_kernels import flat_kernel
    from lmkern.testing.offline import recording

    for _ in range(2):
        with recording("sm_90", compiled=False) as launches:
            lmkern.cast(torch.zeros(64), torch.bfloat16, backend="triton")
        assert len(launches) == 1
    assert not flat_kernel.compiled


CHECKS = {
    check.__name__: check for check in (check_a_refused_launch_is_not_kept, check_launches, check_hooks)
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The error of each check."""
    path = tmp_path_factory.mktemp("launches") / "errors.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, __file__, str(path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


@pytest.mark.parametrize("check", CHECKS)
def test_a_launch_is_triton_s(check: str, errors: dict[str, str]) -> None:
    assert not errors[check], errors[check]


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {}
    for name, check in CHECKS.items():
        try:
            check()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    Path(sys.argv[1]).write_text(json.dumps(found))
