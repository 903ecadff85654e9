"""Batches of pairs of like lengths, a pure function of (seed, step): little of them is padding."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmkern.data.pair_shards import PairSplit
from lmkern.data.tokenizer import END_OF_TEXT_ID

IGNORED = -100  # a target that does not count


class PairBatches:
    """In each epoch every pair once, in batches of at most batch_tokens tokens, padding included.

    Both sides of a pair end with <|endoftext|>. Pairs are sorted by length, source first, and cut into
    batches; an epoch shuffles pairs that have equal lengths, and the batches. So the cuts are the same in
    every epoch: step s is batch s % batches_per_epoch of epoch s // batches_per_epoch.

    context: pairs with a longer side, its end included, are left out (`left_out` counts them).
    joined: one sequence for a decoder, the source and then the target, instead of two; both must fit.
    Raises ValueError if no pair fits.
    """

    def __init__(
        self, split: PairSplit, *, batch_tokens: int, context: int, seed: int = 0, joined: bool = False
    ) -> None:
        self.split, self.seed, self.joined = split, seed, joined
        sizes = split.lengths + 1  # (P, 2)
        fits = sizes.sum(1) - 1 <= context if joined else (sizes <= context).all(1)
        fits &= sizes.sum(1) <= batch_tokens
        self._pairs = np.flatnonzero(fits)
        self.left_out = len(sizes) - len(self._pairs)
        if not len(self._pairs):
            raise ValueError(
                f"PairBatches: no pair of the {split.name} split fits into a context of {context} and "
                f"{batch_tokens} tokens a batch; raise them"
            )
        self._sizes = sizes[self._pairs]
        # The target's length goes up and down by turns: neighbours stay alike where the source's changes.
        turn = np.where(self._sizes[:, 0] % 2, self._sizes[:, 1], -self._sizes[:, 1])
        self._key = (turn, self._sizes[:, 0])
        by_length = self._sizes[np.lexsort(self._key)]
        self._cuts = _cut(by_length, batch_tokens)
        self.batches_per_epoch = len(self._cuts) - 1
        held = np.diff(self._cuts) * np.add.reduce(
            [np.maximum.reduceat(by_length[:, side], self._cuts[:-1]) for side in (0, 1)]
        )
        self.padding = 1 - float(self._sizes.sum() / held.sum())
        self._epoch: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """(source, targets, source_mask) of a step: (B, N_s) int64, (B, N_t) int64, (B, N_s) boolean.

        Padding is <|endoftext|> with a mask of False in source, and IGNORED in targets. Joined: (inputs,
        targets, None), both (B, N_s + N_t - 1), with IGNORED where the next token belongs to the source.
        """
        if step < 0:
            raise ValueError(f"PairBatches: step must be at least 0; got {step}")
        epoch, index = divmod(step, self.batches_per_epoch)
        order, batches = self._of_epoch(epoch)
        batch = batches[index]
        pairs = self._pairs[order[self._cuts[batch] : self._cuts[batch + 1]]]
        return joined(self.split, pairs) if self.joined else padded(self.split, pairs)

    def _of_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The order of the pairs in an epoch, and of its batches."""
        if self._epoch is None or self._epoch[0] != epoch:
            # The raw output of PCG64 is the same in every numpy; its shuffle is not promised to be.
            source = np.random.PCG64(np.random.SeedSequence([self.seed, epoch]))
            order = np.lexsort((source.random_raw(len(self._pairs)), *self._key))
            batches = np.argsort(source.random_raw(self.batches_per_epoch), kind="stable")
            self._epoch = epoch, order, batches
        return self._epoch[1:]


def padded(split: PairSplit, pairs: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
    """(source, targets, source_mask) of these pairs, as PairBatches gives them."""
    sources, targets = ([split.tokens(side, pair) for pair in pairs] for side in (0, 1))
    source, source_mask = _pad(sources, END_OF_TEXT_ID)
    return source, _pad(targets, IGNORED)[0], source_mask


def joined(split: PairSplit, pairs: NDArray[np.int64]) -> tuple[Tensor, Tensor, None]:
    """(inputs, targets, None) of these pairs: a decoder reads the source and is judged on the target."""
    inputs, targets = [], []
    for pair in pairs:
        source, target = (split.tokens(side, pair) for side in (0, 1))
        inputs.append(np.concatenate((source, target[:-1])))
        targets.append(np.concatenate((np.full(len(source) - 1, IGNORED), target)))
    return _pad(inputs, END_OF_TEXT_ID)[0], _pad(targets, IGNORED)[0], None


def _pad(rows: list[NDArray[np.int64]], value: int) -> tuple[Tensor, Tensor]:
    """(B, N) int64, filled up with the value, and (B, N) boolean, True where a row is."""
    lengths = np.array([len(row) for row in rows])
    there = np.arange(lengths.max()) < lengths[:, None]
    result = np.full(there.shape, value, dtype=np.int64)
    result[there] = np.concatenate(rows)
    return torch.from_numpy(result), torch.from_numpy(there)


def _cut(sizes: NDArray[np.int64], batch_tokens: int) -> NDArray[np.int64]:
    """Where batches begin, and the end: each takes the pairs that fit, one after the other."""
    cuts, source, target = [0], 0, 0
    for index, (n_source, n_target) in enumerate(sizes.tolist()):
        source, target = max(source, n_source), max(target, n_target)
        if (index + 1 - cuts[-1]) * (source + target) > batch_tokens:
            cuts.append(index)
            source, target = n_source, n_target
    return np.array([*cuts, len(sizes)])
