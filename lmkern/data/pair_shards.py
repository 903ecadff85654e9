"""Shards of pairs: a safetensors file a split, read through a memory map, and the text of both sides."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from lmkern.data.pairs import KEYS, Pair
from lmkern.data.tokenizer import END_OF_TEXT_ID
from lmkern.files import save_tensors

ENCODE_AT_ONCE = 1024  # texts: bounds the memory that their encodings take


@dataclass(frozen=True)
class PairSplit:
    """One split of a data folder of pairs.

    source, target: (T,) uint16 or int32, mapped from the file, the tokens of all pairs one after the other.
    source_starts, target_starts: (pairs + 1,) int64, where each begins, and the end.
    """

    name: str
    source: torch.Tensor
    target: torch.Tensor
    source_starts: torch.Tensor
    target_starts: torch.Tensor
    path: Path  # of the text

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(pairs, 2): tokens of source and target, their ends not counted."""
        return np.stack([np.diff(starts.numpy()) for starts in (self.source_starts, self.target_starts)], 1)

    def __len__(self) -> int:
        return len(self.source_starts) - 1

    def tokens(self, side: int, pair: int) -> NDArray[np.int64]:
        """The source (side 0) or target (1) of a pair with the <|endoftext|> that ends it."""
        tokens, starts = ((self.source, self.source_starts), (self.target, self.target_starts))[side]
        first, end = starts[pair], starts[pair + 1]
        return np.append(tokens[first:end].numpy().astype(np.int64), END_OF_TEXT_ID)

    def text(self) -> list[tuple[str, str]]:
        """Source and target of each pair."""
        records = map(json.loads, self.path.read_text(encoding="utf-8").split("\n")[:-1])
        return [(record[KEYS[0]], record[KEYS[1]]) for record in records]


@dataclass(frozen=True)
class PairDataset:
    """A data folder of pairs: manifest (as in manifest.json), tokenizer and the three splits."""

    manifest: dict[str, Any]
    tokenizer: Tokenizer
    train: PairSplit
    validation: PairSplit
    test: PairSplit
    end_of_text: int = END_OF_TEXT_ID

    @property
    def folder(self) -> Path:
        """The data folder."""
        return self.train.path.parent


def encode_pairs(
    tokenizer: Tokenizer, pairs: Sequence[Pair], progress: Callable[[int], None] = lambda done: None
) -> dict[str, torch.Tensor]:
    """The tensors of a shard (see PairSplit). progress: called with the number of pairs done."""
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.int32
    tensors = {}
    for side, key in enumerate(KEYS):
        tokens: list[NDArray[Any]] = []
        lengths: list[int] = []
        for first in range(0, len(pairs), ENCODE_AT_ONCE):
            texts = [getattr(pair, key) for pair in pairs[first : first + ENCODE_AT_ONCE]]
            for encoding in tokenizer.encode_batch(texts):
                tokens.append(np.array(encoding.ids, dtype=dtype))
                lengths.append(len(encoding.ids))
            progress((side * len(pairs) + first + len(texts)) // len(KEYS))
        tensors[key] = torch.from_numpy(np.concatenate(tokens))
        tensors[f"{key}_starts"] = torch.from_numpy(np.cumsum([0, *lengths]))
    return tensors


def write_pairs(
    folder: Path,
    name: str,
    tensors: dict[str, torch.Tensor],
    pairs: Sequence[Pair],
    metadata: dict[str, str],
) -> None:
    """<name>.safetensors and <name>.jsonl, a line a pair."""
    save_tensors(tensors, folder / f"{name}.safetensors", metadata)
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for pair in pairs:
            record = {"source": pair.source, "target": pair.target}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
