"""A decoder that reads source and target as one sequence: what its context leaves, and sources beyond it."""

from types import SimpleNamespace

import pytest
import torch

from lmkern.generation import PrefixDecoder, beam_search, rewrite
from lmkern.models import GPT, GPTConfig

CONTEXT, END = 16, 0


class Letters:
    """A token a letter."""

    def encode_batch(self, texts):
        return [SimpleNamespace(ids=[ord(letter) - 96 for letter in text]) for text in texts]

    def decode(self, ids):
        return "".join(chr(96 + token) for token in ids)


def decoder(context: int = CONTEXT) -> PrefixDecoder:
    """A model with random weights that never ends a target by itself."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=27, layers=1, heads=2, width=16, context=context, dropout=0.0)
    model = GPT(config).eval()
    head = model.head.forward
    model.head.forward = lambda x: head(x) * 20 - 1000.0 * (torch.arange(27) == END)
    return PrefixDecoder(model, END)


@pytest.mark.parametrize("length", [1, 10, 15, 16])
def test_a_target_is_as_long_as_the_context_leaves_and_that_of_a_longer_context(length):
    source = torch.randint(1, 27, (2, length), generator=torch.Generator().manual_seed(1))
    source[:, -1] = END
    model = decoder()
    found = beam_search(model, source, beams=3, max_new_tokens=30)
    # The last token is predicted and not read.
    expected = beam_search(model, source, beams=3, max_new_tokens=CONTEXT + 1 - length)
    assert [len(hypothesis.tokens) for hypothesis in found] == [CONTEXT + 1 - length] * 2
    assert found == expected


def test_a_source_without_room_for_a_target_is_refused():
    with pytest.raises(ValueError, match=r"leave room for a target in the model's context of 16.*got .* 17"):
        beam_search(decoder(), torch.ones(1, 17, dtype=torch.int64))


def test_a_source_that_is_too_long_costs_its_own_target_only():
    """The context is filled by 15 letters and their end."""
    sources, notes, steps = ["abc", "b" * 16, "", "c" * 15, "d" * 40, "abd"], [], []
    model = decoder()
    found = rewrite(
        model,
        Letters(),
        sources,
        beams=2,
        max_new_tokens=16,
        note=notes.append,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert [bool(target) for target in found] == [True, False, False, True, False, True]
    assert found[0] == rewrite(model, Letters(), ["abc"], beams=2, max_new_tokens=16)[0]
    assert steps[-1] == (3, 3)
    assert len(notes) == 2
    assert notes[0].startswith(
        "rewrite: source 2 has 16 tokens and its end; the model's context of 16 leaves"
    )
    assert notes[1].startswith("rewrite: source 5 has 40 tokens") and "'dddd" in notes[1]
    with pytest.warns(UserWarning, match="source 1 has 16 tokens"):
        assert rewrite(model, Letters(), ["a" * 16]) == [""]
