"""Prompts are beginnings of unseen documents."""

from types import SimpleNamespace
from typing import Any, cast

from lmkern.jobs.steps import beginnings


def dataset(*texts: str) -> Any:
    return cast(Any, SimpleNamespace(test=SimpleNamespace(text=lambda: list(texts))))


def test_prompts_are_the_first_words_as_they_stand() -> None:
    assert beginnings(dataset("  One two\n three  four five"), 1, words=4) == ["  One two\n three  four"]


def test_prompts_spread_over_the_split_and_short_documents_are_left_out() -> None:
    texts = [f"{number} b c d" for number in range(9)]
    assert beginnings(dataset("too short", *texts), 3, words=2) == ["0 b", "3 b", "6 b"]


def test_split_with_no_long_document_gives_no_prompt() -> None:
    assert beginnings(dataset("a b", ""), 3, words=2) == []
