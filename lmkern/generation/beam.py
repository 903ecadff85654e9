"""Beam search: the target that a model finds likeliest for a source, for many sources at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lmkern.generation.inference import inference
from lmkern.generation.sampling import check_largest


class BeamCache(Protocol):
    """What the decoder keeps of the tokens read so far."""

    def reorder(self, rows: Tensor) -> None:
        """Row b goes on from what row rows[b] has read."""


class EncoderDecoder(Protocol):
    """What beam search asks of a model: any nn.Module with these.

    One that reads source and target as one sequence also has `context`: the most tokens it can read of both.
    """

    @property
    def config(self) -> Any:
        """With fields `start` and `end`: the tokens before a target and after it."""

    def encode(self, source: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """source (B, N_s) int64 -> memory (B, N_s, E)."""

    def new_cache(self, batch: int, context: int) -> BeamCache: ...

    def decode(
        self, target: Tensor, memory: Tensor, source_mask: Tensor | None = None, *, cache: Any
    ) -> Tensor:
        """target (B * beams, N) int64 -> logits (B * beams, N, V); the beams of a source lie side by side."""


@dataclass(frozen=True)
class Hypothesis:
    """A target without its end, and log p(target, end | source) / penalty."""

    tokens: tuple[int, ...]
    score: float


def room(context: int | None, source_tokens: int) -> float:
    """The most tokens of a target that a source of so many leaves room for in a context; None: no end."""
    # The last token of a target is not read.
    return float("inf") if context is None else context + 1 - source_tokens


@dataclass
class _Search:
    """One source: its place among them all, and the best finished targets."""

    index: int
    finished: list[Hypothesis] = field(default_factory=list)

    def add(self, hypothesis: Hypothesis, beams: int) -> None:
        self.finished.append(hypothesis)
        # Stable: among equals the one that was found first stays first.
        self.finished.sort(key=lambda found: -found.score)
        del self.finished[beams:]


def beam_search(
    model: EncoderDecoder,
    source: Tensor,
    source_mask: Tensor | None = None,
    *,
    beams: int = 5,
    length_penalty: float = 1.0,
    max_new_tokens: int = 256,
) -> list[Hypothesis]:
    """The best target of each source that a search with so many beams finds.

    source: (B, N_s) int64; source_mask: (B, N_s) boolean, False: padding; default all seen.
    beams: prefixes kept at each step; 1 is greedy search.
    length_penalty: a target of n tokens, its end included, is scored log p / ((5 + n) / 6)^length_penalty:
        0 asks for the likeliest, more for longer ones (Wu et al. 2016, arXiv:1609.08144, without coverage).
    max_new_tokens: the longest target, its end included; less where the model's context leaves less. One
        that has not ended by then counts as it stands, if no other has.

    A source leaves the search once so many targets as there are beams have ended, or none of its prefixes can
    still beat the best of them. Every beam reads one token a step against the key-value cache, in one batch
    for all sources; that the bits do not depend on what else is in the batch is not promised.

    Raises ValueError for options out of range, for sources that leave no room for a target, and for a model
    that gives NaN.
    """
    if beams < 1 or max_new_tokens < 1 or not 0 <= length_penalty < float("inf"):
        raise ValueError(
            "beam_search: beams and max_new_tokens must be at least 1 and length_penalty finite and at least "
            f"0; got {beams}, {max_new_tokens}, {length_penalty}"
        )
    best: list[Hypothesis] = [Hypothesis((), -float("inf"))] * len(source)
    if not len(source):
        return best
    context: int | None = getattr(model, "context", None)
    max_new_tokens = int(min(max_new_tokens, room(context, source.shape[1])))
    if max_new_tokens < 1:
        raise ValueError(
            f"beam_search: source must leave room for a target in the model's context of {context} tokens; "
            f"got sources of {source.shape[1]}. Give shorter ones"
        )
    module = cast(nn.Module, model)
    device = next(module.parameters()).device
    source = source.to(device)
    mask = torch.ones_like(source, dtype=torch.bool) if source_mask is None else source_mask.to(device)

    def penalty(length: int) -> float:
        return float(((5 + length) / 6) ** length_penalty)

    with inference(module):
        memory = model.encode(source, mask)
        searches = [_Search(index) for index in range(len(source))]
        cache = model.new_cache(len(source) * beams, max_new_tokens)
        prefixes = torch.empty(len(source), beams, 0, dtype=torch.int64, device=device)
        # One beam begins; the others are copies of it, which must not be found again.
        scores = torch.full((len(source), beams), -torch.inf, dtype=torch.float32, device=device)
        scores[:, 0] = 0.0
        last = torch.full((len(source) * beams, 1), model.config.start, device=device)
        for length in range(1, max_new_tokens + 1):
            logits = model.decode(last, memory, mask, cache=cache)[:, -1].float()
            log_probs = logits.log_softmax(dim=-1).view(len(searches), beams, -1)  # (S, beams, V)
            vocabulary = log_probs.shape[-1]
            candidates = (scores[..., None] + log_probs).flatten(1)
            # Of each beam one candidate at most ends, so beams of these go on.
            top, where = candidates.topk(min(2 * beams, candidates.shape[1]), dim=1)
            # NaN ranks as the largest, so the first of each row tells of the whole row.
            check_largest("beam_search", top[:, 0])
            origin, token = where // vocabulary, where % vocabulary
            ends = token == model.config.end
            _finish(searches, prefixes, top, origin, ends, beams, penalty(length))
            # Those that end sink to the back, the others keep their order.
            order = torch.where(ends, -torch.inf, top).argsort(dim=1, descending=True, stable=True)[:, :beams]
            scores = torch.where(ends, -torch.inf, top).gather(1, order)
            origin, token = origin.gather(1, order), token.gather(1, order)
            prefixes = torch.cat(
                [prefixes.gather(1, origin[..., None].expand(-1, -1, length - 1)), token[..., None]], dim=2
            )
            if length == max_new_tokens:
                _cut_off(searches, prefixes, scores, penalty(length))
                going: list[int] = []
            else:
                likeliest = scores.max(dim=1).values.tolist()
                going = [
                    row
                    for row, search in enumerate(searches)
                    if _open(search, likeliest[row], beams, penalty(max_new_tokens))
                ]
            for row in set(range(len(searches))).difference(going):
                best[searches[row].index] = searches[row].finished[0]
            if not going:
                break
            rows = torch.tensor(going, device=device)
            cache.reorder((rows[:, None] * beams + origin[rows]).flatten())
            if len(going) < len(searches):
                searches = [searches[row] for row in going]
                memory, mask, prefixes, scores = memory[rows], mask[rows], prefixes[rows], scores[rows]
            last = prefixes[:, :, -1].reshape(-1, 1)
    return best


def _finish(
    searches: list[_Search],
    prefixes: Tensor,
    top: Tensor,
    origin: Tensor,
    ends: Tensor,
    beams: int,
    penalty: float,
) -> None:
    """Hand the candidates that end to their searches: those among the first `beams` only."""
    for row, rank in (ends & top.isfinite())[:, :beams].nonzero().tolist():
        tokens = tuple(prefixes[row, origin[row, rank]].tolist())
        searches[row].add(Hypothesis(tokens, float(top[row, rank]) / penalty), beams)


def _cut_off(searches: list[_Search], prefixes: Tensor, scores: Tensor, penalty: float) -> None:
    """What has not ended counts as it stands where nothing has."""
    for row, search in enumerate(searches):
        if not search.finished:
            tokens = tuple(prefixes[row, 0].tolist())
            search.add(Hypothesis(tokens, float(scores[row, 0]) / penalty), 1)


def _open(search: _Search, likeliest: float, beams: int, longest: float) -> bool:
    """Whether to go on: a prefix may still become the best, as log p only falls and the penalty grows."""
    if likeliest == -float("inf") or len(search.finished) >= beams:
        return False
    return not search.finished or likeliest / longest > search.finished[0].score
