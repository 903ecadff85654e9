"""What an installation without a compiler leaves behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# An editable installation of lmkern would lend its compiled modules to the copy.
SCRIPT = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import torch, lmkern
from lmkern.kernels.backends import describe
for row in describe(): print(row.op, row.backend, row.usable, row.reason)
q = torch.randn(1, 2, 5, 8)
print(lmkern.attention(q, q, q, causal=True).isfinite().all().item())
"""


def test_without_a_compiler_the_reference_serves_and_doctor_says_why(tmp_path: Path) -> None:
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "lmkern", tmp_path / "lmkern", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "CXX": "no-such-compiler", "LMKERN_CUDA": "0", "PYTHONPATH": str(tmp_path)}

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    run("setup.py", "build_ext", "--inplace")
    # The modules that were copied along belong to an older build.
    assert not list((tmp_path / "lmkern").glob("*.so"))
    *rows, finite = run("-c", SCRIPT).splitlines()
    assert finite == "True"
    (line,) = (row for row in rows if row.startswith("attention cpu"))
    assert line.startswith("attention cpu False was not built: no C++ compiler: looked for no-such-compiler;")
    assert "pip install" in line
