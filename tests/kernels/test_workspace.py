"""Scratch memory of the CPU kernels: kept up to a limit, counted, reported."""

import shutil
import subprocess
from pathlib import Path

import pytest

import lmkern
from lmkern.kernels import native
from lmkern.testing import AttentionShape, Target, attention_inputs, targets

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_workspaces_are_bounded_and_counted(tmp_path: Path) -> None:
    program, source = tmp_path / "workspace", ROOT / "tests" / "csrc" / "workspace.cpp"
    command = [COMPILER, "-std=c++17", "-O1", "-pthread", f"-I{ROOT / 'csrc'}", source, "-o", program]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("target", [t for t in targets("attention") if t.backend == "cpu"], ids=str)
def test_each_module_reports_what_it_keeps(target: Target) -> None:
    # The one dtype that every module computes in.
    q, k, v = (x.bfloat16() for x in attention_inputs(AttentionShape(1, 4, 100, 16, 100, 4))[:3])
    with target.active():
        lmkern.attention(q, k, v, backend="cpu")
        module = native.cpu_modules()[native.instruction_set()]
        assert 0 < module.workspace_bytes() <= 64 * 2**20 * 8
