import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkern.data.spans import paragraph_starts, sentence_starts


def spans(text: str, starts: list[int]) -> list[str]:
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def sentences(text: str) -> list[str]:
    return spans(text, sentence_starts(text))


def test_blank_lines_belong_to_the_paragraph_before_them() -> None:
    text = "One.\nStill one.\n\n    Two.\n\n\nThree."
    assert spans(text, paragraph_starts(text)) == ["One.\nStill one.\n\n", "    Two.\n\n\n", "Three."]


@pytest.mark.parametrize(
    "expected",
    [
        ["One.", " Two!", " Is it?", " Yes."],
        ['He said "Stop."', " She did."],
        ["It ends here…", " Then (a note.)", " And on."],
        ["A line ends.\n", "The next begins."],
        ["The wrapped\nline goes on.", " Here\ntoo."],
        ["Two spaces. ", " Then more."],
        ["One.\n\n", "Two.\n\n", "  Three."],
        ["I saw it and so did I.", " You did not."],
        ["Items:\n", "* first\n", "* second\n", "  1. nested\n", ">>> code"],
        ["1. Install it.", " Run it."],
        ["See Fig. 3 and No. 7.", " No. That is wrong."[:4], " That is wrong."],
        ["Done on Sept. 11, in Jan. too."],
    ],
)
def test_english_sentences(expected: list[str]) -> None:
    assert sentences("".join(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Mr. Smith and Dr. J. R. Jones met Mrs. Hall.",
        "Use e.g. Python, i.e. CPython 3.11.2 or so.",
        "The U.S. Army read file.txt and lmkern.data.prepare here.",
        "He asked why? and left.",
        "It failed (oops!), then worked.",
    ],
)
def test_one_english_sentence(text: str) -> None:
    assert sentences(text) == [text]


def test_chinese_and_japanese_full_stops_end_sentences_without_white_space() -> None:
    expected = [
        "你好。",
        "今天天气很好！",
        "(真的。)",
        "完了；结束。",
        "他问：「去吗？」",
        "「好。」",
        "走吧……",
        "これはペンです。\n",
        "終わり。",
    ]
    text = "".join(expected)
    assert sentences(text) == [
        "你好。",
        "今天天气很好！",
        "(真的。)",
        "完了；结束。",
        "他问：「去吗？」",
        "「好。」",
        "走吧……これはペンです。\n",
        "終わり。",
    ]


@given(st.text(st.sampled_from("aB1 .!?\n。”)*->\t"), max_size=60))
@settings(deadline=None, max_examples=300)
def test_spans_cover_the_text_and_every_paragraph_starts_a_sentence(text: str) -> None:
    paragraphs, found = paragraph_starts(text), sentence_starts(text)
    for starts in (paragraphs, found):
        assert starts[0] == 0
        assert starts == sorted(set(starts))
        assert all(start < len(text) for start in starts[1:])
    assert set(paragraphs) <= set(found)
