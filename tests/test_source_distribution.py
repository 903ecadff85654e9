"""What a source distribution holds: all that the package is built, tested and timed with."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What only a clone has a use for.
OF_A_CLONE = {".ci/run", ".gitignore"}


def setup(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="needs the clone")
def test_every_tracked_file_is_in_it_and_nothing_that_was_built(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()} - OF_A_CLONE
    done = setup(ROOT, "egg_info", "--egg-base", str(tmp_path))
    assert done.returncode == 0, done.stderr
    held = set((tmp_path / "lmkern.egg-info" / "SOURCES.txt").read_text(encoding="utf-8").splitlines())
    assert "csrc/cpu_module.cpp" in held
    assert sorted(tracked - held) == []
    assert [name for name in held if name.endswith((".so", ".pyc"))] == []


def test_without_the_build_description_nothing_is_installed(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "lmkern/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    done = setup(tmp_path, "build_ext", "--inplace")
    assert done.returncode == 1
    assert "incomplete: CMakeLists.txt is missing" in done.stderr
