"""Hands the build to CMake + Ninja. Without a compiler the package installs all the same; see doctor."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def wants_cuda() -> bool:
    """LMKERN_CUDA=1 or 0 decides; otherwise a GPU and nvcc on this machine."""
    choice = os.environ.get("LMKERN_CUDA")
    if choice is not None:
        return choice not in ("", "0")
    return shutil.which("nvcc") is not None and Path("/dev/nvidiactl").exists()


class CMakeBuild(build_ext):
    """Builds the CPU modules, then the CUDA module if wanted; a failure of either is recorded, not raised."""

    def run(self) -> None:
        if not (ROOT / "CMakeLists.txt").is_file():
            # No lack of this machine's, which is recorded and lived with: it could be built nowhere.
            raise SystemExit(f"lmkern: the package in {ROOT} is incomplete: CMakeLists.txt is missing")
        package = ROOT / "lmkern" if self.inplace or self.editable_mode else Path(self.build_lib) / "lmkern"
        package.mkdir(parents=True, exist_ok=True)
        self.build("cpu", package)
        (package / "_build_failure_cuda.txt").unlink(missing_ok=True)
        if wants_cuda():
            self.build("cuda", package)

    def build(self, kind: str, package: Path) -> None:
        # A module of an older build must neither pass for a new one nor be written over while it is in use.
        for module in package.glob(f"_{kind}*.so"):
            module.unlink()
        report = package / f"_build_failure_{kind}.txt"
        report.unlink(missing_ok=True)
        build_dir = ROOT / "build" / f"{kind}-{sys.implementation.cache_tag}"
        try:
            require_compiler()
            import pybind11

            # Everything that pip's build isolation puts in a new place each time is said anew each time.
            configure = [
                "cmake", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja",
                f"-DCMAKE_BUILD_TYPE={os.environ.get('LMKERN_BUILD_TYPE', 'Release')}",
                f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}", f"-DLMKERN_MODULES={kind}",
                f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DCMAKE_INSTALL_PREFIX={package}",
            ]  # fmt: skip
            # Ninja's own choice is more of them, which on two cores is no faster.
            jobs = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
            install = ["cmake", "--build", str(build_dir), "--target", "install", "--parallel", jobs]
            for command in (configure, install):
                subprocess.run(
                    command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            output = getattr(error, "output", None) or ""
            tail = "\n".join(output.strip().splitlines()[-15:])
            report.write_text(f"{error}\n{tail}\n", encoding="utf-8")
            print(f"lmkern: the {kind} kernels were not built; see `lmkern doctor`\n{error}\n{tail}")


def require_compiler() -> None:
    """FileNotFoundError in words, before CMake says the same in twenty lines."""
    choice = os.environ.get("CXX")
    names = choice.split()[:1] if choice else ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        raise FileNotFoundError(
            f"no C++ compiler: looked for {', '.join(names)}; install one (Debian and Ubuntu: "
            "apt install g++) and run pip install again"
        )


setup(ext_modules=[Extension("lmkern._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
