"""The statistical baseline: an n-gram model with interpolated modified Kneser-Ney smoothing.

Chen and Goodman 1998, "An Empirical Study of Smoothing Techniques for Language Modeling", Harvard TR-10-98.
A neural model that does not beat it has learnt less than counting gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmkern.evaluation.documents import Ints, document_spans

# For n-grams counted 1, 2 and 3 or more times, where the counts of counts give no estimate.
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)


@dataclass(frozen=True)
class Level:
    """The n-grams of one length k. An n-gram's id is its rank here; a context is an n-gram of length k - 1.

    keys: (grams,) int64, ascending: context id * (V + 1) + last token.
    probability: (grams,) float64, the discounted share of the n-gram among those with its context.
    backoff: (contexts,) float64, the share that discounting freed for the shorter contexts.
    """

    keys: NDArray[np.int64]
    probability: NDArray[np.float64]
    backoff: NDArray[np.float64]


@dataclass(frozen=True)
class KneserNey:
    """p(w | h) = max(c(h w) - D(c(h w)), 0) / c(h .) + backoff(h) p(w | h without its oldest token).

    For the longest n-grams, and for those that begin where a document begins, c is how often they occur; for
    all others it is how many different tokens occur before them. D(1), D(2) and D(3 or more) are estimated
    for each length. The empty context falls back on 1 / V, so that every token has a probability above 0.

    One mark stands before each document, as <|endoftext|> does for a neural model. The mark has the id V: it
    is never taken for an <|endoftext|> inside a text, and never itself predicted.
    """

    vocab_size: int
    discounts: tuple[tuple[float, float, float], ...]
    levels: tuple[Level, ...]

    @classmethod
    def fit(cls, tokens: ArrayLike, vocab_size: int, order: int = 5, *, documents: ArrayLike) -> KneserNey:
        """Counts the n-grams of 1 to order tokens.

        tokens: (N,) integers in [0, vocab_size). documents: start offset of each document in tokens.

        Raises ValueError for an order below 1, no tokens, and tokens outside the vocabulary.
        """
        if order < 1:
            raise ValueError(f"KneserNey.fit: order must be at least 1; got {order}. The usual choice is 5")
        stream, depth = _stream("KneserNey.fit", tokens, documents, vocab_size)
        if not len(stream):
            raise ValueError("KneserNey.fit: expected tokens to count; got none. Pass the training split")

        keys: list[Ints] = []
        adjusted: list[Ints] = []
        opens_document = np.zeros(0, dtype=bool)
        ids = np.zeros(len(stream), dtype=np.int64)
        for k in range(1, order + 1):
            positions = np.flatnonzero(depth >= k - 1)
            packed = np.roll(ids, 1)[positions] * (vocab_size + 1) + stream[positions]
            grams, first, inverse = np.unique(packed, return_index=True, return_inverse=True)
            if k > 1:
                # The n-grams of length k - 1 are now known with every token that ever stood before them.
                seen_before = np.bincount(ids[positions[first]], minlength=len(keys[-1]))
                adjusted[-1] = np.where(opens_document, adjusted[-1], seen_before)
            predicted = stream[positions] != vocab_size
            keys.append(grams)
            adjusted.append(np.bincount(inverse[predicted], minlength=len(grams)))
            opens_document = depth[positions[first]] == k - 1
            ids = np.full(len(stream), -1, dtype=np.int64)
            ids[positions] = inverse

        discounts = tuple(estimate_discounts(counts) for counts in adjusted)
        contexts = [1] + [len(grams) for grams in keys[:-1]]
        levels = (
            _level(grams, grams // (vocab_size + 1), counts, discount, n)
            for grams, counts, discount, n in zip(keys, adjusted, discounts, contexts, strict=True)
        )
        return cls(vocab_size, discounts, tuple(levels))

    @property
    def order(self) -> int:
        return len(self.levels)

    def log_probs(self, tokens: ArrayLike, *, documents: ArrayLike) -> NDArray[np.float64]:
        """(N,) float64: the natural logarithm of the probability of each token after those before it.

        Contexts never reach over the start of a document.
        """
        stream, depth = _stream("KneserNey.log_probs", tokens, documents, self.vocab_size)
        probability = np.full(len(stream), 1.0 / self.vocab_size)
        ids = np.zeros(len(stream), dtype=np.int64)
        for level in self.levels:
            # A mark ends no n-gram of two tokens or more, so no known context reaches over one.
            context = np.roll(ids, 1)
            known = np.flatnonzero(context >= 0)
            packed = context[known] * (self.vocab_size + 1) + stream[known]
            rank = np.searchsorted(level.keys, packed)
            # A key above all others has the rank after the last, where this key is none.
            found = np.append(level.keys, -1)[rank] == packed
            probability[known] *= level.backoff[context[known]]
            probability[known[found]] += level.probability[rank[found]]
            ids = np.full(len(stream), -1, dtype=np.int64)
            ids[known[found]] = rank[found]
        log_probs: NDArray[np.float64] = np.log(probability[depth > 0])
        return log_probs


def estimate_discounts(counts: Ints) -> tuple[float, float, float]:
    """D(1), D(2), D(3 or more) from n1 .. n4, the numbers of n-grams counted once to four times.

    Y = n1 / (n1 + 2 n2),  D(c) = c - (c + 1) Y n(c + 1) / n(c)  (Chen and Goodman 1998).
    FALLBACK_DISCOUNTS if a number is missing or an estimate lies outside (0, c], as in very small corpora.
    """
    n1, n2, n3, n4 = (float(np.count_nonzero(counts == c)) for c in (1, 2, 3, 4))
    if not (n1 and n2 and n3):
        return FALLBACK_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    estimate = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    if not all(0 < discount <= count for count, discount in enumerate(estimate, start=1)):
        return FALLBACK_DISCOUNTS
    return estimate


def _stream(name: str, tokens: ArrayLike, documents: ArrayLike, vocab_size: int) -> tuple[Ints, Ints]:
    """The tokens with a mark (the number V) before each document, and each one's distance from its mark."""
    tokens, starts, ends = document_spans(name, tokens, documents)
    if len(tokens) and (tokens.min() < 0 or tokens.max() >= vocab_size):
        raise ValueError(
            f"{name}: tokens must lie in [0, {vocab_size}); got {tokens.min()} to {tokens.max()}. "
            "Pass the vocab_size of the tokenizer that wrote them"
        )
    stream = np.insert(tokens, starts, vocab_size)
    marks = starts + np.arange(len(starts))
    return stream, np.arange(len(stream)) - np.repeat(marks, ends - starts + 1)


def _level(
    keys: Ints, context: Ints, counts: Ints, discounts: tuple[float, float, float], n_contexts: int
) -> Level:
    """keys, context, counts: (grams,) -> the discounted probabilities and what each context passes down."""
    discount = np.array((0.0, *discounts))[np.minimum(counts, 3)]
    total = np.bincount(context, weights=counts, minlength=n_contexts)
    freed = np.bincount(context, weights=discount, minlength=n_contexts)
    # A context that only ever ended its document has nothing to say: all is left to the shorter ones.
    never = total == 0
    backoff = np.where(never, 1.0, freed / np.where(never, 1.0, total))
    probability = (counts - discount) / np.where(never, 1.0, total)[context]
    return Level(keys, probability, backoff)
