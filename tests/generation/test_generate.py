from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn

from lmkern.generation.generate import generate, stream_text
from lmkern.generation.sampling import sample

V = 13


class StubCache:
    def __init__(self) -> None:
        self.length = 0
        self.state = torch.zeros(V)


class Decaying(nn.Module):
    """Logits from a decaying sum over all tokens read, by absolute position: the whole context matters."""

    def __init__(self, context: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(context=context)
        # A token makes itself unlikely, so that no text gets stuck.
        self.table = nn.Parameter(torch.randn(V, V) - 3 * torch.eye(V))
        self.position = nn.Parameter(torch.randn(context, V))
        self.dropout = nn.Dropout(0.5)
        self.read: list[int] = []

    def new_cache(self, batch: int) -> StubCache:
        assert batch == 1
        return StubCache()

    def forward(self, tokens: Tensor, cache: StubCache | None = None) -> Tensor:
        cache = cache or StubCache()
        self.read.append(tokens.shape[1])
        logits = []
        for token in tokens[0]:
            assert cache.length < self.config.context, "the cache is full"
            cache.state = 0.7 * cache.state + self.table[token] + self.position[cache.length]
            cache.length += 1
            logits.append(cache.state)
        return self.dropout(torch.stack(logits)[None])


def without_cache(model: Decaying, prompt: list[int], n: int, temperature: float, seed: int) -> list[int]:
    """Every token from a fresh reading of the window that the docstring promises."""
    context = model.config.context
    generator = torch.Generator().manual_seed(seed)
    window, out = prompt[-context:], []
    model.eval()
    for _ in range(n):
        if len(window) > context:
            window = window[-max(1, context // 2) :]
        logits = model(torch.tensor([window]))[0, -1].detach()
        out.append(int(sample(logits, temperature=temperature, generator=generator)))
        window = [*window, out[-1]]
    return out


@pytest.mark.parametrize("context", [1, 2, 7, 8, 100])
@pytest.mark.parametrize("prompt_length", [1, 7, 8, 30])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_generation_equals_uncached(context, prompt_length, temperature):
    model = Decaying(context)
    prompt = [i % V for i in range(3, 3 + prompt_length)]
    ids = list(generate(model, prompt, max_new_tokens=40, temperature=temperature, seed=5))
    assert len(set(ids)) > 1
    assert ids == without_cache(model, prompt, 40, temperature, 5)


def test_each_token_is_read_once_until_the_cache_is_full():
    model = Decaying(8)
    list(generate(model, [1, 2, 3], max_new_tokens=12))
    assert model.read == [3, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 4]


def test_seed_decides_and_the_global_generator_does_not():
    model = Decaying(16)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = list(generate(model, [1], max_new_tokens=30, seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert first == list(generate(model, [1], max_new_tokens=30, seed=3))
    assert first != list(generate(model, [1], max_new_tokens=30, seed=4))


def test_filters_reach_the_sampler():
    model = Decaying(16)
    greedy = list(generate(model, [1], max_new_tokens=20, temperature=0))
    assert greedy == list(generate(model, [1], max_new_tokens=20, top_k=1))
    assert greedy == list(generate(model, [1], max_new_tokens=20, top_p=1e-6))
    assert greedy != list(generate(model, [1], max_new_tokens=20))


def test_stop_ends_the_text_and_is_not_part_of_it():
    model = Decaying(16)
    ids = list(generate(model, [1], max_new_tokens=50))
    stop = ids[5]
    expected = ids[: ids.index(stop)]
    assert list(generate(model, [1], max_new_tokens=50, stop=stop)) == expected
    assert list(generate(model, [1], max_new_tokens=50, stop={stop, V + 1})) == expected
    assert list(generate(model, [1], max_new_tokens=50, stop=())) == ids
    for kind in (np.int64, np.array, torch.tensor):
        assert list(generate(model, [1], max_new_tokens=50, stop=kind(stop))) == expected
        assert list(generate(model, [1], max_new_tokens=50, stop=[kind(stop)])) == expected
    for several in (torch.tensor([V + 1, stop]), np.array([V + 1, stop])):
        assert list(generate(model, [1], max_new_tokens=50, stop=several)) == expected


def test_tokens_arrive_one_at_a_time_and_the_model_is_its_owners_between_them():
    model = Decaying(16).train()
    ids = generate(model, torch.tensor([1, 2]), max_new_tokens=3)
    assert model.read == []
    next(ids)
    assert model.read == [2]
    assert model.training and model.dropout.training and torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert len(list(ids)) == 2 and model.read == [2, 1, 1]


def test_no_new_tokens_means_no_work():
    model = Decaying(16)
    assert list(generate(model, [1], max_new_tokens=0)) == [] and model.read == []


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "expected at least one prompt token; got none"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens must be at least 0; got -1"),
        ([1], {"temperature": -1.0}, "temperature must be finite and at least 0"),
        ([1], {"top_p": 2.0}, "top_p must lie in"),
        ([1], {"top_k": 2.5}, "top_k must be an integer, at least 0; got 2.5"),
        ([1.7], {}, r"prompt_tokens must be ids of tokens, in one dimension; got \[1.7\]"),
        (torch.tensor([[1, 2]]), {}, r"prompt_tokens must be .*; got shape \(1, 2\)"),
        ([1], {"stop": "12"}, "stop must be ids of tokens, in one dimension; got '12'"),
        ([1], {"stop": [1.0]}, r"stop must be ids of tokens, in one dimension; got \[1.0\]"),
    ],
)
def test_bad_options_are_refused_before_the_first_token(prompt, options, message):
    with pytest.raises(ValueError, match="generate: " + message):
        generate(Decaying(4), prompt, **{"max_new_tokens": 1, **options})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte-level: special token 0, a token for each byte, and two that end and begin inside a character."""
    byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
    parts = [byte_level.pre_tokenize_str(c)[0][0] for c in "漢🙂"]  # a character for each byte
    vocabulary = ["<|endoftext|>", *sorted(ByteLevel.alphabet()), parts[0][:2], parts[1][1:3]]
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    made.pre_tokenizer = byte_level
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    return made


@given(st.lists(st.integers(0, 258), max_size=30))
def test_pieces_join_to_the_text_whatever_the_bytes(tokenizer, ids):
    assert "".join(stream_text(tokenizer, ids)) == tokenizer.decode(ids)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=12))
def test_no_piece_holds_half_a_character(tokenizer, text):
    ids = tokenizer.encode(text).ids
    pieces = list(stream_text(tokenizer, ids))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


def test_characters_are_printed_as_soon_as_they_are_whole(tokenizer):
    ids = tokenizer.encode("aé🙂b").ids
    pieces = stream_text(tokenizer, iter(ids))
    assert list(pieces) == ["a", "é", "🙂", "b"]


def test_a_text_that_ends_inside_a_character_still_joins(tokenizer):
    ids = tokenizer.encode("a🙂").ids[:-1]
    assert list(stream_text(tokenizer, ids)) == ["a", tokenizer.decode(ids[1:])]


def test_special_tokens_have_no_text(tokenizer):
    a, b = tokenizer.encode("ab").ids
    assert list(stream_text(tokenizer, [a, 0, b, 0])) == ["a", "b"]
