import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_an_environment_with_a_space_in_its_path_is_refused_in_words() -> None:
    done = subprocess.run(
        ["make", "-n", "VENV=my venv", "lint"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "VENV: expected a path without white space" in done.stderr
    assert "got 'my venv'" in done.stderr
