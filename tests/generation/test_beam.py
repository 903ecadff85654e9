"""Beam search against an exhaustive one, and against the model without a cache."""

import itertools
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from lmkern.generation import beam_search
from lmkern.models import T5, T5Config


def tiny(vocab_size: int = 4, seed: int = 0, scale: float = 3.0) -> T5:
    """A T5 with random weights and logits far enough apart that targets differ from source to source."""
    torch.manual_seed(seed)
    sizes = {"layers": 2, "heads": 2, "width": 16, "feed_forward": 32, "buckets": 8}
    model = T5(T5Config(vocab_size=vocab_size, **sizes, dropout=0.0, start=0, end=0))
    with torch.no_grad():
        model.embedding.weight *= scale
        # What was read before weighs as much as the last token: a cache in the wrong order shows.
        for block in model.decoder:
            block.attention.out.weight *= 10
    return model.eval()


def sources(vocab_size: int, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    source = torch.randint(1, vocab_size, (len(lengths), max(lengths)))
    return source, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def log_prob(model: T5, source: torch.Tensor, target: tuple[int, ...]) -> float:
    """log p of a target and its end, all at once and without a cache."""
    tokens = torch.tensor([[*target, model.config.end]])
    with torch.no_grad():
        return -float(model.loss(source[None], tokens, reduction="sum"))


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_with_enough_beams_it_finds_what_an_exhaustive_search_finds(seed, length_penalty):
    model, longest = tiny(seed=seed), 4
    source, mask = sources(4, (5, 2, 4))
    targets = [t for n in range(longest) for t in itertools.product((1, 2, 3), repeat=n)]
    found = beam_search(model, source, mask, beams=40, length_penalty=length_penalty, max_new_tokens=longest)
    for row, hypothesis in enumerate(found):
        kept = source[row][mask[row]]
        scores = {t: log_prob(model, kept, t) / ((5 + len(t) + 1) / 6) ** length_penalty for t in targets}
        best = max(scores, key=scores.__getitem__)
        assert hypothesis.tokens == best
        assert hypothesis.score == pytest.approx(scores[best], abs=1e-4)


def test_one_beam_is_greedy_search():
    model, longest = tiny(vocab_size=12, seed=3), 10
    source, mask = sources(12, (6, 3, 5, 1))
    found = beam_search(model, source, mask, beams=1, max_new_tokens=longest)
    for row, hypothesis in enumerate(found):
        kept, tokens = source[row][mask[row]][None], [0]
        while len(tokens) <= longest:
            with torch.no_grad():
                tokens.append(int(model(kept, torch.tensor([tokens]))[0, -1].argmax()))
            if tokens[-1] == 0:
                break
        assert hypothesis.tokens == tuple(tokens[1:-1] if tokens[-1] == 0 else tokens[1:])


class Remembering(torch.nn.Module):
    """Logits are random numbers that depend on the source and on every token before."""

    config = SimpleNamespace(start=0, end=0)

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def encode(self, source, source_mask):
        return source

    def new_cache(self, batch, context):
        return ReadTokens(torch.empty(batch, 0, dtype=torch.int64))

    def decode(self, target, memory, source_mask, *, cache):
        cache.rows = torch.cat([cache.rows, target], dim=1)
        beams = len(target) // len(memory)
        return torch.stack(
            [self.logits(memory[row // beams], cache.rows[row])[None] for row in range(len(target))]
        )

    @staticmethod
    def logits(source, prefix):
        seed = hash((*source.tolist(), -1, *prefix.tolist())) % 2**31
        return torch.randn(7, generator=torch.Generator().manual_seed(seed))


@dataclass
class ReadTokens:
    rows: torch.Tensor

    def reorder(self, rows):
        self.rows = self.rows[rows]


def test_every_beam_goes_on_from_what_it_has_read():
    model, longest = Remembering(), 8
    source, _ = sources(12, (5,) * 9)
    for row, hypothesis in enumerate(beam_search(model, source, beams=4, max_new_tokens=longest)):
        # One that was cut off has no end, and is as long as may be.
        tokens = [*hypothesis.tokens, 0][:longest]
        expected = sum(
            model.logits(source[row], torch.tensor([0, *tokens[:n]])).log_softmax(0)[token].item()
            for n, token in enumerate(tokens)
        )
        assert hypothesis.score == pytest.approx(expected / ((5 + len(tokens)) / 6), abs=1e-4)


def test_a_source_has_the_same_target_alone_and_in_a_batch():
    model = tiny(vocab_size=12, seed=5, scale=1.5)
    source, mask = sources(12, (7, 2, 4, 6, 3))
    together = beam_search(model, source, mask, beams=4, max_new_tokens=12)
    for row, hypothesis in enumerate(together):
        (alone,) = beam_search(model, source[row][mask[row]][None], beams=4, max_new_tokens=12)
        assert alone.tokens == hypothesis.tokens
        assert alone.score == pytest.approx(hypothesis.score, abs=1e-4)


def test_more_beams_never_score_worse_here_and_longer_targets_come_with_the_penalty():
    model = tiny(vocab_size=12, seed=5, scale=1.5)
    source, mask = sources(12, (7, 2, 4, 6, 3))

    def mean(beams: int, penalty: float) -> tuple[float, float]:
        found = beam_search(model, source, mask, beams=beams, length_penalty=penalty, max_new_tokens=12)
        return sum(h.score for h in found), sum(len(h.tokens) for h in found)

    assert mean(1, 0.0)[0] <= mean(12, 0.0)[0]
    assert mean(12, 0.0)[1] <= mean(12, 1.5)[1]


def test_no_sources_no_targets_and_the_mode_of_the_model_stays():
    model = tiny().train()
    assert beam_search(model, torch.empty(0, 3, dtype=torch.int64)) == []
    beam_search(model, torch.ones(1, 2, dtype=torch.int64), max_new_tokens=3)
    assert model.training


@pytest.mark.parametrize("beams", [1, 3])
def test_a_model_that_gives_nan_is_refused(beams):
    model = tiny()
    with torch.no_grad():
        model.decoder_norm.weight[3] = math.nan
    with pytest.raises(ValueError, match=r"beam_search: the largest logit .* finite; got \[nan.*diverged"):
        beam_search(model, torch.ones(2, 2, dtype=torch.int64), beams=beams)


@pytest.mark.parametrize(
    "options", [{"beams": 0}, {"max_new_tokens": 0}, {"length_penalty": -1.0}, {"length_penalty": math.nan}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="beam_search: beams and max_new_tokens must be at least 1"):
        beam_search(tiny(), torch.ones(1, 2, dtype=torch.int64), **options)
