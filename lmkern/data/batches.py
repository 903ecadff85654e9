"""Training batches as a pure function of (seed, step): whoever asks for step s gets the same tokens."""

import numpy as np
import torch
from numpy.typing import NDArray

from lmkern.data.shards import UNITS, Split
from lmkern.data.tokenizer import END_OF_TEXT_ID

EPOCHS_KEPT = 2  # a batch may begin in one epoch and end in the next


class Batches:
    """Batches of packed sentences, paragraphs or documents, without padding.

    In each epoch the units are shuffled by (seed, unit, epoch), each is followed by <|endoftext|> (the last
    of a document already is), and all are concatenated and cut into rows of context + 1 tokens that overlap
    by one: every token is predicted once, but for the epoch's first and a tail shorter than a row. Row i of
    the whole training is row i % batch of step i // batch, whatever was asked before.

    split: the text; unit: "sentences", "paragraphs" or "documents"; context: N, tokens a row; batch: B, rows.
    """

    def __init__(
        self, split: Split, *, unit: str = "documents", context: int, batch: int, seed: int = 0
    ) -> None:
        if unit not in UNITS:
            raise ValueError(f"Batches: unit must be one of {', '.join(UNITS)}; got {unit!r}")
        if context < 1 or batch < 1 or seed < 0:
            raise ValueError(
                f"Batches: context and batch must be at least 1 and seed at least 0; "
                f"got context {context}, batch {batch}, seed {seed}"
            )
        self.context, self.batch, self.seed = context, batch, seed
        self._unit = UNITS.index(unit)
        self._tokens: NDArray[np.integer] = split.tokens.numpy()
        self._starts: NDArray[np.int64] = getattr(split, unit).numpy()
        self._ends = np.append(self._starts[1:], len(self._tokens))
        # With the <|endoftext|> that follows it.
        self._sizes = self._ends - self._starts + (self._tokens[self._ends - 1] != END_OF_TEXT_ID)
        self.rows_per_epoch = (int(self._sizes.sum()) - 1) // context
        if self.rows_per_epoch < 1:
            raise ValueError(
                f"Batches: a row needs context + 1 = {context + 1} tokens; the {split.name} split has "
                f"{self._sizes.sum()} in {unit}; choose a smaller context or give more text"
            )
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(inputs, targets) of a step, both (B, N) int64; targets are the inputs one token on."""
        if step < 0:
            raise ValueError(f"Batches: step must be at least 0; got {step}")
        epochs, rows = np.divmod(np.arange(step * self.batch, (step + 1) * self.batch), self.rows_per_epoch)
        tokens = np.concatenate([self._rows(int(e), rows[epochs == e]) for e in np.unique(epochs)])
        result = torch.from_numpy(tokens)  # (B, N + 1)
        return result[:, :-1].contiguous(), result[:, 1:].contiguous()

    def _rows(self, epoch: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens of some rows of an epoch, (rows, N + 1)."""
        order, ends = self._epoch(epoch)
        positions = rows[:, None] * self.context + np.arange(self.context + 1)
        place = np.searchsorted(ends, positions, side="right")  # of the unit in the epoch's order
        unit = order[place]
        index = self._starts[unit] + positions - (ends[place] - self._sizes[unit])
        added = index == self._ends[unit]
        tokens = self._tokens[np.minimum(index, len(self._tokens) - 1)]
        return np.where(added, END_OF_TEXT_ID, tokens).astype(np.int64)

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The order of the units in an epoch and where each ends in the epoch's tokens."""
        if epoch not in self._epochs:
            while len(self._epochs) >= EPOCHS_KEPT:
                del self._epochs[next(iter(self._epochs))]
            # The raw output of PCG64 is the same in every numpy; its shuffle is not promised to be.
            source = np.random.PCG64(np.random.SeedSequence([self.seed, self._unit, epoch]))
            order = np.argsort(source.random_raw(len(self._starts)), kind="stable")
            self._epochs[epoch] = order, np.cumsum(self._sizes[order])
        return self._epochs[epoch]
