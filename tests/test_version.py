"""The version is said once, and CHANGELOG.md begins with it."""

import re
import tomllib
from pathlib import Path

import lmkern
from lmkern.machine import version, versions

ROOT = Path(__file__).resolve().parents[1]


def test_the_changelog_begins_with_the_version() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    release = lmkern.__version__.removesuffix(".dev0")
    unreleased = " (unreleased)" if lmkern.__version__.endswith(".dev0") else ""
    assert headings[0] == release + unreleased


def test_doctor_runs_and_data_say_it() -> None:
    assert version("lmkern") == versions()["lmkern"] == lmkern.__version__


def test_the_package_is_built_with_it() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in table["project"]["dynamic"]
    assert table["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "lmkern.__version__"}
