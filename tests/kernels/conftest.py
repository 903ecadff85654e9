"""The CUDA kernels on the CPU, for the tests beside this file."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import platform
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
EMULATOR = ROOT / "tests/csrc/cuda_emulator"
SOURCES = (
    "cuda_module.cpp",
    "layer_norm/cuda_forward.cu",
    "layer_norm/cuda_backward.cu",
    "attention/cuda_forward.cu",
    "attention/cuda_backward.cu",
)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """csrc's CUDA module compiled for the CPU, through tests/csrc/cuda_emulator."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64" or platform.system() != "Linux":
        pytest.skip("the CUDA emulator needs g++ on x86-64 Linux")
    import pybind11

    folder = tmp_path_factory.mktemp("emulated")
    objects = [folder / f"{number}.o" for number in range(len(SOURCES))]
    includes = [EMULATOR, ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = ["-std=c++17", "-O1", "-fPIC", "-mf16c", "-fvisibility=hidden", "-w", "-DLMKERN_HOPPER"]
    flags += [f"-I{path}" for path in includes]

    def build(source: str, compiled: Path) -> None:
        command = [compiler, *flags, "-x", "c++", "-c", ROOT / "csrc" / source, "-o", compiled]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build, SOURCES, objects))
    path = folder / "_cuda.so"
    subprocess.run([compiler, "-shared", *objects, "-o", path], check=True)
    loader = importlib.machinery.ExtensionFileLoader("emulated._cuda", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
