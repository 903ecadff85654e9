from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lmkern.data.tokenizer import END_OF_TEXT, END_OF_TEXT_ID, load_tokenizer, train_tokenizer

TEXTS = ["The cat sat on the mat.\n\n    The mat was flat.", "世界你好。Ça va, naïve café? 🙂"] * 3
TOKENIZER = train_tokenizer(TEXTS, 300)


@given(st.one_of(st.text(), st.text(st.sampled_from("<|endoftext|> \n\t世🙂é"))))
@settings(deadline=None)
def test_decoding_gives_back_any_text(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


def test_a_text_that_spells_out_the_end_of_text_is_ordinary_text(tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    for tokenizer in (TOKENIZER, load_tokenizer(tmp_path / "tokenizer.json")):
        ids = tokenizer.encode(f"a {END_OF_TEXT} b").ids
        assert END_OF_TEXT_ID not in ids
        assert tokenizer.decode(ids) == f"a {END_OF_TEXT} b"


def test_the_end_of_text_is_token_0() -> None:
    assert TOKENIZER.token_to_id(END_OF_TEXT) == END_OF_TEXT_ID == 0


def test_training_repeats() -> None:
    assert train_tokenizer(TEXTS, 300).to_str() == TOKENIZER.to_str()


def test_words_are_learned() -> None:
    tokenizer: Tokenizer = train_tokenizer(["the mat and the cat and the hat"] * 5, 270)
    assert tokenizer.encode("the and the").tokens == ["the", "Ġand", "Ġthe"]


def test_every_line_begins_with_a_token() -> None:
    text = "one\n\n    two\n\tthree\n \n"
    starts = {start for start, _ in train_tokenizer([text] * 9, 400).encode(text).offsets}
    assert {text.index("    two"), text.index("\tthree"), text.index(" \n")} <= starts


def test_a_small_text_gives_a_smaller_vocabulary() -> None:
    assert 257 <= train_tokenizer(["aa"], 5000).get_vocab_size() < 300


def test_a_vocabulary_that_cannot_hold_every_byte_is_refused() -> None:
    assert train_tokenizer(["aaaa"], 257).get_vocab_size() == 257
    with pytest.raises(ValueError, match=r"train_tokenizer: vocab_size must be at least 257 .*; got 256"):
        train_tokenizer(["aaaa"], 256)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"load_tokenizer: .*tokenizer\.json does not exist"):
        load_tokenizer(tmp_path / "tokenizer.json")
