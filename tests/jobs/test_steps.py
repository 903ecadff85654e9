"""Prompts are beginnings of unseen documents."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lmkern.jobs.steps import beginnings, continue_text, translate


def dataset(*texts: str) -> Any:
    return cast(Any, SimpleNamespace(test=SimpleNamespace(text=lambda: list(texts))))


def test_prompts_are_the_first_words_as_they_stand() -> None:
    assert beginnings(dataset("  One two\n three  four five"), 1, words=4) == ["  One two\n three  four"]


def test_prompts_spread_over_the_split_and_short_documents_are_left_out() -> None:
    texts = [f"{number} b c d" for number in range(9)]
    assert beginnings(dataset("too short", *texts), 3, words=2) == ["0 b", "3 b", "6 b"]


def test_split_with_no_long_document_gives_no_prompt() -> None:
    assert beginnings(dataset("a b", ""), 3, words=2) == []


def test_text_that_has_no_bytes_is_refused_before_all_else(tmp_path: Path) -> None:
    """As a byte of a command line that is not UTF-8 comes."""
    with pytest.raises(
        ValueError, match=r"generate: prompt must be Unicode text; got '.udce9' at character 3"
    ):
        continue_text(tmp_path, "caf\udce9", max_new_tokens=3)
    with pytest.raises(ValueError, match=r"translate: source 2 must be Unicode text; got '.udce9'"):
        translate(tmp_path, ["a", "\udce9"])
