"""Text to token shards, and batches out of them."""

from lmkern.data.batches import Batches
from lmkern.data.pair_batches import PairBatches
from lmkern.data.pair_shards import PairDataset, PairSplit
from lmkern.data.prepare import DataConfig, prepare
from lmkern.data.shards import Dataset, Split, load
from lmkern.data.tokenizer import load_tokenizer, train_tokenizer

__all__ = [
    "Batches",
    "DataConfig",
    "Dataset",
    "PairBatches",
    "PairDataset",
    "PairSplit",
    "Split",
    "load",
    "load_tokenizer",
    "prepare",
    "train_tokenizer",
]
