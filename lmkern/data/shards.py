"""Token shards: one safetensors file a split, read through a memory map, checked against the manifest."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from tokenizers import Tokenizer

from lmkern.data.clean import DOCUMENT_SEPARATOR, SPLITS
from lmkern.data.pair_shards import PairDataset, PairSplit
from lmkern.data.spans import paragraph_starts, sentence_starts
from lmkern.data.tokenizer import END_OF_TEXT_ID, load_tokenizer
from lmkern.files import damage, save_tensors

FORMAT, PAIRS_FORMAT, VERSION = "lmkern-data", "lmkern-pairs", 1
# One key: safetensors writes several in no fixed order, and the same data should give the same bytes.
SHARD_METADATA = {"format": "lmkern-shard version 1"}
UNITS = ("sentences", "paragraphs", "documents")
MANIFEST, TOKENIZER, REMOVED = "manifest.json", "tokenizer.json", "removed.jsonl"
FILES = (TOKENIZER, REMOVED, *(f"{name}.{ending}" for name in SPLITS for ending in ("safetensors", "txt")))
PAIR_FILES = tuple(name.replace(".txt", ".jsonl") for name in FILES)
PAIR_TENSORS = ("source", "target", "source_starts", "target_starts")
_REMEDY = "make it again with `lmkern prepare`"
ENCODE_AT_ONCE = 256  # documents: bounds the memory that the tokenizer's offsets take


@dataclass(frozen=True)
class Split:
    """One split of a data folder.

    tokens: (T,) uint16 or int32, mapped from the file; every document is its tokens and <|endoftext|>.
    documents, paragraphs, sentences: int64 start offsets into tokens, ascending, the first 0, each level a
    refinement of the one before. document_bytes: (documents,) int64, UTF-8 bytes of each document's text.
    """

    name: str
    tokens: torch.Tensor
    documents: torch.Tensor
    paragraphs: torch.Tensor
    sentences: torch.Tensor
    document_bytes: torch.Tensor
    path: Path  # of the text

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the documents' text: the denominator of bits per byte."""
        return int(self.document_bytes.sum())

    def text(self) -> list[str]:
        """The text of each document."""
        return self.path.read_bytes().decode().split(DOCUMENT_SEPARATOR)


@dataclass(frozen=True)
class Dataset:
    """A data folder: manifest (as in manifest.json), tokenizer and the three splits."""

    manifest: dict[str, Any]
    tokenizer: Tokenizer
    train: Split
    validation: Split
    test: Split
    end_of_text: int = END_OF_TEXT_ID

    @property
    def folder(self) -> Path:
        """The data folder."""
        return self.train.path.parent


def token_starts(offsets: NDArray[np.int64], characters: Sequence[int]) -> NDArray[np.int64]:
    """The tokens at which the spans that start at these characters begin, ascending and each once.

    offsets: (T, 2) the first and the last-plus-one character of each token. A span begins at the first token
    that starts at or after its character and shares no character with the token before: none is torn.
    """
    whole = np.flatnonzero(np.append(True, offsets[1:, 0] >= offsets[:-1, 1]))
    at = np.searchsorted(offsets[whole, 0], characters)
    return np.unique(whole[at[at < len(whole)]])


def encode(
    tokenizer: Tokenizer, texts: Sequence[str], progress: Callable[[int], None] = lambda done: None
) -> dict[str, torch.Tensor]:
    """The tensors of a shard (see Split). progress: called with the number of texts done."""
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.int32
    tokens: list[NDArray[Any]] = []
    starts: dict[str, list[NDArray[np.int64]]] = {unit: [] for unit in UNITS}
    position = 0
    for first in range(0, len(texts), ENCODE_AT_ONCE):
        batch = texts[first : first + ENCODE_AT_ONCE]
        for text, encoding in zip(batch, tokenizer.encode_batch(batch), strict=True):
            offsets = np.array(encoding.offsets, dtype=np.int64)  # (T, 2)
            starts["documents"].append(np.array([position], dtype=np.int64))
            starts["paragraphs"].append(position + token_starts(offsets, paragraph_starts(text)))
            starts["sentences"].append(position + token_starts(offsets, sentence_starts(text)))
            tokens.append(np.array([*encoding.ids, END_OF_TEXT_ID], dtype=dtype))
            position += len(encoding.ids) + 1
        progress(first + len(batch))
    tensors = {unit: torch.from_numpy(np.concatenate(starts[unit])) for unit in UNITS}
    tensors["tokens"] = torch.from_numpy(np.concatenate(tokens))
    tensors["document_bytes"] = torch.tensor([len(text.encode()) for text in texts], dtype=torch.int64)
    return tensors


def write_split(folder: Path, name: str, tensors: dict[str, torch.Tensor], texts: Sequence[str]) -> None:
    """<name>.safetensors and <name>.txt, the documents of which are separated by DOCUMENT_SEPARATOR."""
    save_tensors(tensors, folder / f"{name}.safetensors", SHARD_METADATA)
    (folder / f"{name}.txt").write_bytes(DOCUMENT_SEPARATOR.join(texts).encode())


def load(folder: str | Path) -> Dataset | PairDataset:
    """The data, text or pairs, that prepare() wrote to a folder, every file checked against the manifest.

    Raises FileNotFoundError for a folder or file that is missing, ValueError for another format or version
    and for a file that is truncated or altered.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"load: {folder / name} is in the manifest but missing; {_REMEDY}")
        if found := damage(folder / name, expected):
            raise ValueError(f"load: {found}; {_REMEDY}")
    tokenizer = load_tokenizer(folder / TOKENIZER)
    if manifest["format"] == PAIRS_FORMAT:
        pairs = [_load_pairs(folder, name) for name in SPLITS]
        return PairDataset(manifest, tokenizer, pairs[0], pairs[1], pairs[2])
    train, validation, test = (_load_split(folder, name) for name in SPLITS)
    return Dataset(manifest, tokenizer, train, validation, test)


def identity(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what a model can be trained or judged on: the splits and the tokenizer."""
    files = {name: file for name, file in manifest["files"].items() if name != REMOVED}
    return sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json, its format and version checked."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"load: expected a folder written by `lmkern prepare`; {path} does not exist")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"], manifest["version"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"load: {path} is truncated or no lmkern manifest; {_REMEDY}") from None
    if found not in ((FORMAT, VERSION), (PAIRS_FORMAT, VERSION)):
        raise ValueError(
            f"load: {path}: expected {FORMAT} version {VERSION}; got {found[0]} version {found[1]}; {_REMEDY}"
        )
    return dict(manifest)


def _load_split(folder: Path, name: str) -> Split:
    tensors = _read_shard(folder / f"{name}.safetensors", ("tokens", *UNITS, "document_bytes"))
    return Split(name=name, path=folder / f"{name}.txt", **tensors)


def _load_pairs(folder: Path, name: str) -> PairSplit:
    tensors = _read_shard(folder / f"{name}.safetensors", PAIR_TENSORS)
    return PairSplit(name=name, path=folder / f"{name}.jsonl", **tensors)


def _read_shard(path: Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as shard:
        if shard.metadata() != SHARD_METADATA:
            raise ValueError(f"load: {path}: expected {SHARD_METADATA}; got {shard.metadata()}; {_REMEDY}")
        return {name: shard.get_tensor(name) for name in names}
