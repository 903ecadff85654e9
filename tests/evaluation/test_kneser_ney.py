import math
from collections import Counter, defaultdict
from itertools import product

import numpy as np
import pytest

from lmkern.evaluation.kneser_ney import FALLBACK_DISCOUNTS, KneserNey, estimate_discounts

START = "start"


class Dictionary:
    """The same model from its definition, one dictionary look-up at a time."""

    def __init__(self, documents: list[list[int]], vocab_size: int, order: int) -> None:
        self.vocab_size, self.order = vocab_size, order
        occurrences: dict[int, Counter] = defaultdict(Counter)
        before: dict[tuple, set] = defaultdict(set)
        for document in documents:
            marked = [START, *document]
            for end in range(2, len(marked) + 1):
                for k in range(1, min(order, end) + 1):
                    gram = tuple(marked[end - k : end])
                    occurrences[k][gram] += 1
                    if end - k > 0:
                        before[gram].add(marked[end - k - 1])
        self.counts = {
            gram: n if k == order or gram[0] == START else len(before[gram])
            for k in range(1, order + 1)
            for gram, n in occurrences[k].items()
        }
        self.discounts = {k: self._discounts(k) for k in range(1, order + 1)}

    def _discounts(self, k: int) -> list[float]:
        n = Counter(c for gram, c in self.counts.items() if len(gram) == k)
        if n[1] and n[2] and n[3]:
            y = n[1] / (n[1] + 2 * n[2])
            estimate = [c - (c + 1) * y * n[c + 1] / n[c] for c in (1, 2, 3)]
            if all(0 < estimate[c - 1] <= c for c in (1, 2, 3)):
                return estimate
        return [0.5, 1.0, 1.5]

    def probability(self, context: tuple, token: int) -> float:
        lower = self.probability(context[1:], token) if context else 1 / self.vocab_size
        followers = [self.counts.get((*context, w), 0) for w in range(self.vocab_size)]
        if not sum(followers):
            return lower
        discounts = [0.0, *self.discounts[len(context) + 1]]
        freed = sum(discounts[min(c, 3)] for c in followers)
        count = self.counts.get((*context, token), 0)
        return (count - discounts[min(count, 3)] + freed * lower) / sum(followers)

    def log_probs(self, documents: list[list[int]]) -> list[float]:
        marked = [[START, *document] for document in documents]
        return [
            math.log(self.probability(tuple(m[max(0, i - self.order + 1) : i]), m[i]))
            for m in marked
            for i in range(1, len(m))
        ]


def flat(documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = [len(document) for document in documents]
    return np.concatenate(documents), np.cumsum([0, *lengths[:-1]])


def random_documents(seed: int, n: int, longest: int, vocab_size: int) -> list[list[int]]:
    """Zipf-like tokens, so that counts of 1, 2, 3, 4 and more all occur; every document ends with 0."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest, size=n)
    return [[*np.minimum(rng.zipf(1.6, size=m), vocab_size - 1).tolist(), 0] for m in lengths]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize(("n", "longest", "vocab_size"), [(40, 30, 30), (3, 4, 6), (1, 1, 2)])
def test_log_probs_match_the_definition(order, n, longest, vocab_size):
    training = random_documents(1, n, longest, vocab_size)
    unseen = random_documents(2, 10, longest, vocab_size)
    tokens, starts = flat(training)
    model = KneserNey.fit(tokens, vocab_size, order, documents=starts)
    slow = Dictionary(training, vocab_size, order)
    for documents in (training, unseen):
        tokens, starts = flat(documents)
        np.testing.assert_allclose(
            model.log_probs(tokens, documents=starts), slow.log_probs(documents), rtol=1e-12
        )


def test_contexts_longer_than_any_training_document_fall_back():
    training, unseen = [[0], [1, 0]], [[1, 0, 1, 1, 0], [1, 1, 0, 1, 0, 1, 0]]
    tokens, starts = flat(training)
    model = KneserNey.fit(tokens, 3, documents=starts)
    tokens, starts = flat(unseen)
    expected = Dictionary(training, 3, 5).log_probs(unseen)
    np.testing.assert_allclose(model.log_probs(tokens, documents=starts), expected, rtol=1e-12)


def test_the_comparison_reaches_estimated_discounts():
    tokens, starts = flat(random_documents(1, 40, 30, 30))
    model = KneserNey.fit(tokens, 30, documents=starts)
    assert sum(discounts != FALLBACK_DISCOUNTS for discounts in model.discounts) >= 3


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_every_conditional_distribution_sums_to_one_and_is_positive(order):
    vocab_size = 4
    tokens, starts = flat(random_documents(3, 12, 9, vocab_size))
    model = KneserNey.fit(tokens, vocab_size, order, documents=starts)
    for length in range(4):
        for context in product(range(vocab_size), repeat=length):
            documents = [[*context, w] for w in range(vocab_size)]
            tokens, starts = flat(documents)
            log_probs = model.log_probs(tokens, documents=starts).reshape(vocab_size, length + 1)[:, -1]
            assert np.isfinite(log_probs).all()
            assert math.fsum(np.exp(log_probs)) == pytest.approx(1, abs=1e-12)


def test_contexts_restart_at_document_starts():
    tokens, starts = flat(random_documents(4, 40, 20, 20))
    model = KneserNey.fit(tokens, 20, documents=starts)
    a, b = [3, 1, 2, 0], [1, 1, 4, 0]
    both = model.log_probs(a + b, documents=[0, 4])
    np.testing.assert_array_equal(both[4:], model.log_probs(b, documents=[0]))
    assert not np.array_equal(both, model.log_probs(a + b, documents=[0]))


def test_end_of_text_inside_a_document_is_no_document_start():
    training = [[1, 0, 2, 0], [2, 3, 0], [1, 0, 3, 0]]
    tokens, starts = flat(training)
    model = KneserNey.fit(tokens, 4, 3, documents=starts)
    np.testing.assert_allclose(
        model.log_probs(tokens, documents=starts), Dictionary(training, 4, 3).log_probs(training), rtol=1e-12
    )


def test_discounts_follow_the_counts_of_counts():
    counts = np.repeat([1, 2, 3, 4, 9], [40, 20, 10, 5, 7])
    y = 40 / 80
    expected = (1 - 2 * y * 20 / 40, 2 - 3 * y * 10 / 20, 3 - 4 * y * 5 / 10)
    assert estimate_discounts(counts) == pytest.approx(expected)


@pytest.mark.parametrize(
    "counts", [[], [1, 1, 1], [1, 2, 4], [5, 6, 7], np.repeat([1, 2, 3, 4], [9, 1, 9, 9])]
)
def test_discounts_without_a_usable_estimate_fall_back(counts):
    assert estimate_discounts(np.array(counts, dtype=np.int64)) == FALLBACK_DISCOUNTS


def test_more_context_helps_on_text_that_repeats():
    rng = np.random.default_rng(5)
    phrases = rng.integers(1, 50, size=(20, 8))
    tokens = np.append(phrases[rng.integers(0, 20, size=400)].ravel(), 0)
    mean = [
        KneserNey.fit(tokens, 50, k, documents=[0]).log_probs(tokens, documents=[0]).mean()
        for k in (1, 2, 3, 5)
    ]
    assert mean == sorted(mean) and mean[-1] > -1


def test_bad_arguments_are_refused_in_words():
    with pytest.raises(ValueError, match=r"KneserNey.fit: tokens must lie in \[0, 4\); got 1 to 4"):
        KneserNey.fit([1, 4], 4, documents=[0])
    with pytest.raises(ValueError, match="order must be at least 1; got 0"):
        KneserNey.fit([1], 4, 0, documents=[0])
    with pytest.raises(ValueError, match="expected tokens to count; got none"):
        KneserNey.fit([], 4, documents=[])
    with pytest.raises(ValueError, match="log_probs: tokens must lie"):
        KneserNey.fit([1], 4, documents=[0]).log_probs([-1], documents=[0])


def test_no_tokens_have_no_log_probs():
    assert KneserNey.fit([1], 4, documents=[0]).log_probs([], documents=[]).shape == (0,)
