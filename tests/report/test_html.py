"""One page that loads nothing and interprets nothing."""

import pytest

from lmkern.report.html import page


def test_raw_html_is_shown_and_not_interpreted() -> None:
    html = page("a <script>alert(1)</script> <img src=x>", title="<t>", pictures={})
    assert "<script" not in html
    assert "<img" not in html
    assert "&lt;script&gt;" in html
    assert "<title>&lt;t&gt;</title>" in html


def test_prompt_is_bold_and_both_parts_are_escaped() -> None:
    html = page("```text prompt=3\n<b>rest</i>\n```", title="t", pictures={})
    assert "<pre><code><b>&lt;b&gt;</b>rest&lt;/i&gt;</code></pre>" in html


def test_picture_is_embedded() -> None:
    html = page("![the caption](a.svg)", title="t", pictures={"a.svg": "<svg/>"})
    assert 'alt="the caption" src="data:image/svg+xml;base64,PHN2Zy8+"' in html


def test_picture_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"picture 'b.svg' is not embedded; expected one of \['a.svg'\]"):
        page("![x](b.svg)", title="t", pictures={"a.svg": "<svg/>"})


def test_tables_keep_their_alignment_inside_a_box_that_scrolls() -> None:
    html = page("| a | b |\n| --- | ---: |\n| 1 | 2 |", title="t", pictures={})
    assert '<div class="table"><table>' in html
    assert '<td style="text-align:right">2</td>' in html


def test_page_follows_the_colour_scheme_and_the_screen() -> None:
    html = page("x", title="t", pictures={})
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
