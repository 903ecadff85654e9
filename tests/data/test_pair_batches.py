"""Batches of pairs against the pairs themselves."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from lmkern.data import PairBatches, PairSplit
from lmkern.data.pair_batches import IGNORED

Tokens = list[list[int]]


def make_split(lengths: list[tuple[int, int]]) -> tuple[PairSplit, Tokens, Tokens]:
    """A split with these lengths, and its sources and targets; every token tells its pair and side."""
    sides: list[Tokens] = [
        [[1 + 2 * pair + side] * length[side] for pair, length in enumerate(lengths)] for side in (0, 1)
    ]
    flat = [torch.tensor([t for row in rows for t in row], dtype=torch.int32) for rows in sides]
    starts = [torch.tensor(np.cumsum([0, *map(len, rows)])) for rows in sides]
    return PairSplit("train", *flat, *starts, Path("none")), *sides


@pytest.fixture(scope="module")
def lengths() -> list[tuple[int, int]]:
    chance = random.Random(0)
    sources = [chance.randint(1, 30) for _ in range(500)]
    return [(n, max(1, n + chance.randint(-4, 6))) for n in sources]


def rows(batch: tuple[torch.Tensor, ...]) -> list[tuple[list[int], list[int]]]:
    source, targets, mask = batch
    return [
        (source[i][mask[i]].tolist(), targets[i][targets[i] != IGNORED].tolist()) for i in range(len(source))
    ]


def test_every_pair_comes_once_an_epoch_with_its_own_target(lengths: list[tuple[int, int]]) -> None:
    split, sources, targets = make_split(lengths)
    batches = PairBatches(split, batch_tokens=400, context=64, seed=3)
    expected = sorted(([*s, 0], [*t, 0]) for s, t in zip(sources, targets, strict=True))
    for epoch in (0, 5):
        steps = range(epoch * batches.batches_per_epoch, (epoch + 1) * batches.batches_per_epoch)
        assert sorted(row for step in steps for row in rows(batches(step))) == expected


def test_batches_are_a_function_of_seed_and_step(lengths: list[tuple[int, int]]) -> None:
    split, *_ = make_split(lengths)

    def make(seed: int) -> PairBatches:
        return PairBatches(split, batch_tokens=400, context=64, seed=seed)

    one, other = make(3), make(3)
    for step in (0, 90, 2, 41, 0):
        assert all(torch.equal(a, b) for a, b in zip(one(step), make(3)(step), strict=True))
    first = [rows(one(step)) for step in range(20)]
    assert first == [rows(other(step)) for step in range(20)]
    assert first != [rows(make(4)(step)) for step in range(20)]
    assert first != [rows(one(step + one.batches_per_epoch)) for step in range(20)]


def test_a_batch_holds_batch_tokens_at_most_and_the_padding_is_what_it_says(
    lengths: list[tuple[int, int]],
) -> None:
    split, *_ = make_split(lengths)
    batches = PairBatches(split, batch_tokens=400, context=64)
    held = padding = 0
    for step in range(batches.batches_per_epoch):
        source, targets, mask = batches(step)
        assert source.numel() + targets.numel() <= 400
        assert source.dtype == targets.dtype == torch.int64 and mask.dtype == torch.bool
        held += source.numel() + targets.numel()
        padding += int((~mask).sum() + (targets == IGNORED).sum())
    assert batches.padding == pytest.approx(padding / held)
    assert 0 < batches.padding < 0.1
    assert held > 0.8 * 400 * batches.batches_per_epoch


def test_pairs_that_are_too_long_are_left_out(lengths: list[tuple[int, int]]) -> None:
    split, *_ = make_split(lengths)
    batches = PairBatches(split, batch_tokens=400, context=20)
    assert batches.left_out == sum(max(pair) >= 20 for pair in lengths)
    assert max(batches(step)[1].shape[1] for step in range(batches.batches_per_epoch)) == 20
    assert PairBatches(split, batch_tokens=30, context=64).left_out == sum(sum(p) + 2 > 30 for p in lengths)
    with pytest.raises(ValueError, match="no pair of the train split fits into a context of 1 and 400"):
        PairBatches(split, batch_tokens=400, context=1)
    with pytest.raises(ValueError, match="step must be at least 0"):
        batches(-1)


def test_joined_a_decoder_reads_the_source_and_is_judged_on_the_target() -> None:
    split, *_ = make_split([(2, 3), (3, 1)])
    batches = PairBatches(split, batch_tokens=100, context=8, joined=True)
    inputs, targets, mask = batches(0)
    assert mask is None
    found = {tuple(x): tuple(y) for x, y in zip(inputs.tolist(), targets.tolist(), strict=True)}
    gap = IGNORED
    assert found == {
        (1, 1, 0, 2, 2, 2): (gap, gap, 2, 2, 2, 0),
        (3, 3, 3, 0, 4, 0): (gap, gap, gap, 4, 0, gap),
    }
    assert PairBatches(split, batch_tokens=100, context=5, joined=True).left_out == 1
