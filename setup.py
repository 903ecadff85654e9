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
        package = ROOT / "lmkern" if self.inplace or self.editable_mode else Path(self.build_lib) / "lmkern"
        package.mkdir(parents=True, exist_ok=True)
        self.build("cpu", package)
        if wants_cuda():
            self.build("cuda", package)

    def build(self, kind: str, package: Path) -> None:
        report = package / f"_build_failure_{kind}.txt"
        report.unlink(missing_ok=True)
        build_dir = ROOT / "build" / f"{kind}-{sys.implementation.cache_tag}"
        try:
            import pybind11

            configure = [
                "cmake", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
                f"-DLMKERN_MODULES={kind}", f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DCMAKE_INSTALL_PREFIX={package}",
            ]  # fmt: skip
            install = ["cmake", "--build", str(build_dir), "--target", "install"]
            for command in (configure, install):
                subprocess.run(
                    command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            output = getattr(error, "output", None) or ""
            tail = "\n".join(output.strip().splitlines()[-15:])
            report.write_text(f"{error}\n{tail}\n", encoding="utf-8")
            print(f"lmkern: the {kind} kernels were not built; see `lmkern doctor`\n{error}\n{tail}")


setup(ext_modules=[Extension("lmkern._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
