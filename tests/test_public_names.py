"""docs/kernels/README.md lists what `import lmkern` gives."""

import re
from pathlib import Path

import pytest

import lmkern

DOCS = Path(__file__).parents[1] / "docs" / "kernels"
ROWS = re.findall(
    r"^\| (`.+?) \|.*\| (.*) \|$", (DOCS / "README.md").read_text(encoding="utf-8"), re.MULTILINE
)
NAMES = [name for names, _ in ROWS for name in re.findall(r"`(\w+)`", names)]


def test_every_name_stands_there_once_and_no_other() -> None:
    assert sorted(NAMES) == sorted(lmkern.__all__)


@pytest.mark.parametrize("page", sorted({page for _, page in ROWS if page}))
def test_what_is_linked_is_there(page: str) -> None:
    link = re.search(r"\((\w+\.md)\)", page)
    path = DOCS / link[1] if link else Path(lmkern.__file__).parents[1] / page.strip("`")
    assert path.is_file()
