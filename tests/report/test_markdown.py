"""The pieces of Markdown show any text literally."""

from html import unescape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from lmkern.report.markdown import bar, block, code, duration, size, table, text, visible

PARSER = MarkdownIt("commonmark", {"html": False}).enable("table")
printable = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=40)


@settings(deadline=None)
@given(printable)
def test_text_in_the_middle_of_a_line_shows_literally(value: str) -> None:
    shown = PARSER.render(f"x {text(value)} x").removeprefix("<p>x ").removesuffix(" x</p>\n")
    assert unescape(shown).split() == value.split()


@settings(deadline=None)
@given(st.text(st.sampled_from("`| \\<&*x"), max_size=12))
def test_code_span_in_a_table_cell_shows_literally(value: str) -> None:
    rendered = PARSER.render(table(("a", "b"), [(code(value), "end")]))
    cell = rendered.split("<td>")[1].split("</td>")[0]
    if value:
        assert unescape(cell.removeprefix("<code>").removesuffix("</code>")).strip() == value.strip()
    else:
        assert cell == "(empty)"
    assert "<td>end</td>" in rendered


@settings(deadline=None)
@given(st.lists(st.sampled_from(["```", "````", "~~~", "`", "\n", " ", "<b>", "&amp;", "# x"]), max_size=12))
def test_block_shows_literally_and_never_ends_early(parts: list[str]) -> None:
    value = "".join(parts)
    rendered = PARSER.render(f"{block(value)}\n\nafter")
    inside, after = rendered.split("</code></pre>")
    assert unescape(inside.partition(">")[2].partition(">")[2]) == value + "\n"
    assert after.strip() == "<p>after</p>"


def test_control_characters_become_visible() -> None:
    assert visible("a\x1b[31m\x00\tb\r\nc\x7f\x85") == "a␛[31m␀\tb\nc␡\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.421, "0.42 s"), (12.34, "12.3 s"), (161, "2 min 41 s"), (11100, "3 h 05 min")],
)
def test_duration_reads_as_people_say_it(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(("n_bytes", "words"), [(812, "812 bytes"), (2_312_345, "2.31 MB"), (4e9, "4 GB")])
def test_size_reads_as_people_say_it(n_bytes: float, words: str) -> None:
    assert size(n_bytes) == words


def test_bar_is_as_long_as_its_share() -> None:
    assert [bar(share, 4) for share in (0, 0.5, 0.53125, 1, 2)] == ["▏", "██", "██▏", "████", "████"]
