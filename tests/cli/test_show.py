"""Tables on a terminal, and texts of models."""

import io
import sys

import pytest

from lmkern.cli.show import columns, text_streams


def test_columns_are_aligned_without_trailing_space() -> None:
    assert columns([("a", "b", ""), ("longer", "c", "d")]) == "a       b\nlonger  c  d"


def test_texts_are_utf_8_in_any_locale_and_without_a_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    source = io.BytesIO("\ufeffläuf\n".encode() + b"\xff")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(source, encoding="ascii"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    text_streams()
    assert sys.stdin.read() == "läuf\n\udcff"
    print("läuft", flush=True)
    assert written.getvalue() == "läuft\n".encode()
