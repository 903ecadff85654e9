"""The files of a report: one page that needs nothing else, and the same in Markdown."""

from html.parser import HTMLParser
from pathlib import Path

from lmkern.report import write_report


class Page(HTMLParser):
    """The tags of a page, the addresses it refers to, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_one_file_that_loads_nothing_and_runs_nothing(full_run: Path) -> None:
    html = write_report(full_run).read_text(encoding="utf-8")
    page = Page(html)
    assert [address[:26] for address in page.addresses] == ["data:image/svg+xml;base64,"]
    assert not page.tags & {"script", "link", "iframe", "i", "a"}
    assert "@import" not in html
    assert "url(" not in html


def test_model_output_shows_literally(full_run: Path, hostile: str) -> None:
    page = Page(write_report(full_run).read_text(encoding="utf-8"))
    assert f"The first line\n{hostile}\n```\n# heading\n␛[31mred" in page.text
    assert "A language model of poems <i>of</i> | all *kinds*" in page.text
    assert "po`ems|2.txt" in page.text


def test_markdown_says_the_same_and_its_picture_stands_beside_it(full_run: Path) -> None:
    html = write_report(full_run)
    assert html == full_run / "report.html"
    markdown = (full_run / "report.md").read_text(encoding="utf-8")
    assert "(curves.svg)" in markdown
    assert (full_run / "curves.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_writing_twice_gives_the_same_bytes(full_run: Path) -> None:
    first = write_report(full_run).read_bytes()
    assert write_report(full_run).read_bytes() == first


def test_fresh_run_has_a_page_without_pictures(fresh_run: Path) -> None:
    page = Page(write_report(fresh_run).read_text(encoding="utf-8"))
    assert page.addresses == []
    assert "has not been evaluated yet" in page.text
