"""The CUDA kernels on the CPU, for the tests beside this file."""

from __future__ import annotations

import fcntl
import importlib.machinery
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from lmkern.kernels import cuda_call

ROOT = Path(__file__).parents[2]
EMULATOR = ROOT / "tests/csrc/cuda_emulator"
SOURCES = (
    "cuda_module.cpp",
    "norm/cuda_forward.cu",
    "norm/cuda_backward.cu",
    "attention/cuda_forward.cu",
    "attention/cuda_backward.cu",
)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """csrc's CUDA module compiled for the CPU, through tests/csrc/cuda_emulator."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64" or platform.system() != "Linux":
        pytest.skip("the CUDA emulator needs g++ on x86-64 Linux")
    # One for all processes of a run: the first compiles, the others wait.
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "emulated"
    folder.mkdir(exist_ok=True)
    path = folder / "_cuda.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            compile_emulated(compiler, path)
    loader = importlib.machinery.ExtensionFileLoader("emulated._cuda", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def compile_emulated(compiler: str, path: Path) -> None:
    import pybind11

    folder = path.parent
    objects = [folder / f"{number}.o" for number in range(len(SOURCES))]
    includes = [EMULATOR, ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = ["-std=c++17", "-O1", "-fPIC", "-mf16c", "-fvisibility=hidden", "-w", "-DLMKERN_HOPPER"]
    flags += [f"-I{path}" for path in includes]

    def build(source: str, compiled: Path) -> None:
        command = [compiler, *flags, "-x", "c++", "-c", ROOT / "csrc" / source, "-o", compiled]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build, SOURCES, objects))
    part = path.with_suffix(".part")
    subprocess.run([compiler, "-shared", *objects, "-o", part], check=True)
    part.replace(path)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(cuda_call.unavailable() is not None, reason=str(cuda_call.unavailable())),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """cpu: the CUDA backends take CPU tensors, on an emulated GPU of three processors."""
    if request.param == "cpu":
        compiled = request.getfixturevalue("emulated")
        monkeypatch.setattr(cuda_call, "module", lambda: compiled)
        monkeypatch.setattr(cuda_call, "device_and_stream", lambda x: (0, 0))
        monkeypatch.setattr(cuda_call, "processors", lambda device: 3)
    return str(request.param)
