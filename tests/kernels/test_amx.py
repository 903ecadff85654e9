"""The kernels of AMX's module on processors without AMX: its own tests, with tile instructions in C++.

Two builds of a module in one process are one build, so the tests run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lmkern.kernels import native

ROOT = Path(__file__).parents[2]
EMULATOR = ROOT / "tests/csrc/amx_emulator"
BUILD = ROOT / "build" / f"amx-{sys.implementation.cache_tag}"

# Every test that names the instruction set: errors, edges, options, bits of the ops that it has kernels of.
TESTS = ("tests/ops", "tests/kernels/test_native.py", "tests/kernels/test_workspace.py", "-k", "amx")

SCRIPT = """
import sys, pytest, lmkern
from lmkern.kernels import native
lmkern.__path__.insert(0, sys.argv[1])
from lmkern import _cpu_baseline
supported = ("amx", *_cpu_baseline.supported_instruction_sets())
_cpu_baseline.supported_instruction_sets = lambda: supported
assert native.cpu_modules()["amx"].__file__.startswith(sys.argv[1])
raise SystemExit(pytest.main(sys.argv[2:]))
"""


def test_kernels_pass_their_tests_on_emulated_tiles() -> None:
    if "amx" in native.cpu_modules():
        pytest.skip("the processor has AMX, and the tests use it")
    if "avx512_bf16" not in native.cpu_modules():
        pytest.skip("all but tiles is AVX-512 with BF16, which the processor does not have")
    if importlib.util.find_spec("lmkern._cpu_amx") is None:
        pytest.skip("the compiler knows no AMX")
    import pybind11

    configure = [
        "cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        # Found before csrc's file of the same name.
        f"-DCMAKE_CXX_FLAGS=-iquote {shlex.quote(str(EMULATOR))}",
    ]  # fmt: skip
    run(*configure)
    run("cmake", "--build", str(BUILD), "--target", "_cpu_amx")
    run(sys.executable, "-c", SCRIPT, str(BUILD), *TESTS, "-q", "--maxfail=5", "-p", "no:cacheprovider")


def run(*command: str) -> None:
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": tools, "PYTHONPATH": str(ROOT), "LMKERN_CPU_ISA": "amx"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-8000:]}{done.stderr[-4000:]}"
