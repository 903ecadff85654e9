"""From text to a data folder, in one call."""

import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lmkern.data import shards
from lmkern.data.clean import SPLITS, Corpus, clean
from lmkern.data.corpus import EMBEDDED_SOURCES, Document, Removed, list_files, read_embedded, read_files
from lmkern.data.pair_shards import encode_pairs, write_pairs
from lmkern.data.pairs import PairCorpus, clean_pairs
from lmkern.data.tokenizer import MIN_VOCAB_SIZE, train_tokenizer
from lmkern.files import check_place, checksum, replacing_folder, write_json
from lmkern.machine import version
from lmkern.ops.dispatch import flag

MIN_DOCUMENT_BYTES = 64
MIN_SPLIT_BYTES = 1024
# With this many pieces of equal size, validation or test is empty in fewer than 1 % of the corpora, and holds
# less than MIN_SPLIT_BYTES of ENOUGH_BYTES in fewer than 2 %.
ENOUGH_PIECES = 64
ENOUGH_BYTES = 40 * MIN_SPLIT_BYTES

Progress = Callable[[str, int, int | None], None]  # stage, done, total (None: not known)


@dataclass(frozen=True)
class DataConfig:
    """What to prepare. ValueError, naming the field, for a value out of range."""

    paths: tuple[str, ...] = ()
    """Text files and folders of them. Empty: the embedded corpus."""
    vocab_size: int = 4096
    """Tokens in the vocabulary, at least 257."""
    max_document_bytes: int = 8192
    """Longer texts are cut at paragraphs."""
    train: tuple[str, ...] = ()
    """Pairs instead of text: a JSON-lines file of {"source", "target"}, or two parallel files; also .gz."""
    validation: tuple[str, ...] = ()
    """The pairs to validate on, likewise. Empty: a tenth of the training pairs."""
    test: tuple[str, ...] = ()
    """The pairs to judge on, likewise. Empty: a tenth of the training pairs."""

    def __post_init__(self) -> None:
        for name in ("paths", "train", "validation", "test"):
            paths = getattr(self, name)
            if isinstance(paths, str):
                raise ValueError(f"DataConfig: {name} must be a sequence of paths; got the string {paths!r}")
            object.__setattr__(self, name, tuple(str(path) for path in paths))
            for path in getattr(self, name):
                # A configuration is TOML, in which bytes that are no text have no place.
                if any("\ud800" <= character <= "\udfff" for character in path):
                    raise ValueError(
                        f"DataConfig: expected {name} whose names are text; got {path!a}: rename it, name "
                        "its folder, or set PYTHONUTF8=1 if it is UTF-8"
                    )
            if name != "paths" and len(paths) > 2:
                raise ValueError(
                    f"DataConfig: {name} must be one JSON-lines file or two parallel files, source before "
                    f"target; got {len(paths)} paths"
                )
        if self.paths and self.train:
            raise ValueError("DataConfig: give paths of text or train pairs, not both; got both")
        if (self.validation or self.test) and not self.train:
            raise ValueError("DataConfig: validation and test are of pairs and need train; got none")
        if self.vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(
                f"DataConfig: vocab_size must be at least {MIN_VOCAB_SIZE} (256 bytes and the end of text); "
                f"got {self.vocab_size}"
            )
        if self.max_document_bytes < MIN_DOCUMENT_BYTES:
            raise ValueError(
                f"DataConfig: max_document_bytes must be at least {MIN_DOCUMENT_BYTES}; "
                f"got {self.max_document_bytes}"
            )


def prepare(
    config: DataConfig,
    folder: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Reads, cleans and splits the text, trains the tokenizer on the train split and writes the folder.

    The folder appears whole or not at all. It holds manifest.json, tokenizer.json, a <split>.safetensors and
    a <split>.txt for train, validation and test, and removed.jsonl: a line for everything that was left out.
    The same config, text, lmkern and libraries give the same bytes. Returns the manifest.

    overwrite: replace a folder that holds data (and nothing else).
    progress: called with (stage, done, total) for the stages read, train tokenizer, encode <split> and write.

    Raises FileNotFoundError for a path that is missing, ValueError where there is no text or too little of
    it, FileExistsError if the folder is taken, OSError before all work where it cannot be written.
    """
    folder = Path(folder).resolve()
    _check_free(folder, flag("prepare", "overwrite", overwrite))
    check_place(folder)
    if config.train:
        return _prepare_pairs(config, folder, progress)
    name, sources, total, documents = _read(config)
    corpus = clean(documents, config.max_document_bytes, lambda done: progress("read", done, total))
    _check_enough(corpus, config)
    tokenizer = _train_tokenizer(corpus.splits["train"], config, progress)

    def write_split(partial: Path, split: str) -> dict[str, int]:
        return _write_split(partial, split, corpus.splits[split], tokenizer, progress)

    about = {
        "name": name,
        "sources": list(sources),
        "files": corpus.counts["read"],
        "bytes": corpus.bytes,
        "sha256": corpus.sha256,
        "encodings": corpus.encodings,
    }
    return _write(config, folder, shards.FORMAT, about, corpus, tokenizer, write_split, progress)


def _prepare_pairs(config: DataConfig, folder: Path, progress: Progress) -> dict[str, Any]:
    progress("read", 0, 1)
    corpus = clean_pairs(config.train, config.validation, config.test)
    progress("read", 1, 1)
    train = corpus.splits["train"]
    texts = [side for pair in train for side in (pair.source, pair.target)]
    tokenizer = _train_tokenizer(texts, config, progress)

    def write_split(partial: Path, split: str) -> dict[str, int]:
        pairs = corpus.splits[split]
        tensors = encode_pairs(tokenizer, pairs, lambda done: progress(f"encode {split}", done, len(pairs)))
        write_pairs(partial, split, tensors, pairs, shards.SHARD_METADATA)
        return {
            "pairs": len(pairs),
            "bytes": sum(pair.bytes for pair in pairs),
            "source_tokens": len(tensors["source"]),
            "target_tokens": len(tensors["target"]),
        }

    sources = [*config.train, *config.validation, *config.test]
    about = {
        "name": " + ".join(map(_name, config.train)),
        "sources": sources,
        "files": len(sources),
        "bytes": sum(pair.bytes for pairs in corpus.splits.values() for pair in pairs),
        "sha256": corpus.sha256,
    }
    return _write(config, folder, shards.PAIRS_FORMAT, about, corpus, tokenizer, write_split, progress)


def _train_tokenizer(texts: list[str], config: DataConfig, progress: Progress) -> Tokenizer:
    progress("train tokenizer", 0, 1)
    tokenizer = train_tokenizer(texts, config.vocab_size)
    progress("train tokenizer", 1, 1)
    return tokenizer


def _write(
    config: DataConfig,
    folder: Path,
    kind: str,
    about: dict[str, Any],
    corpus: Corpus | PairCorpus,
    tokenizer: Tokenizer,
    write_split: Callable[[Path, str], dict[str, int]],
    progress: Progress,
) -> dict[str, Any]:
    """The whole folder; its manifest. write_split: writes a split's files and gives its line."""
    with replacing_folder(folder) as partial:
        splits = {split: write_split(partial, split) for split in SPLITS}
        progress("write", 0, 1)
        (partial / shards.TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        with (partial / shards.REMOVED).open("w", encoding="utf-8", errors="backslashreplace") as file:
            for removed in corpus.removed:
                file.write(json.dumps(asdict(removed), ensure_ascii=False) + "\n")
        files = shards.PAIR_FILES if kind == shards.PAIRS_FORMAT else shards.FILES
        manifest = {
            "format": kind,
            "version": shards.VERSION,
            "lmkern": version("lmkern"),
            "python": platform.python_version(),
            "config": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in asdict(config).items()
            },
            "corpus": about,
            "counts": dict(corpus.counts),
            "splits": splits,
            "vocab_size": tokenizer.get_vocab_size(),
            "files": {file: checksum(partial / file) for file in files},
        }
        write_json(partial / shards.MANIFEST, manifest)
    progress("write", 1, 1)
    return manifest


def _read(config: DataConfig) -> tuple[str, tuple[str, ...], int | None, Iterator[Document | Removed]]:
    """The corpus' name, its sources, the number of its documents if it is known, and the documents."""
    if not config.paths:
        name = f"Python {platform.python_version()}: language reference and docstrings"
        return name, EMBEDDED_SOURCES, None, read_embedded()
    files = list_files(config.paths)
    name = " + ".join(map(_name, config.paths))
    return name, config.paths, len(files), read_files(files)


def _name(path: str) -> str:
    """What a corpus that was read from there is called; a shell's pipes have numbers for names."""
    return "a pipe" if Path(path).is_fifo() else Path(path).resolve().name


def _write_split(
    folder: Path, name: str, texts: list[str], tokenizer: Tokenizer, progress: Progress
) -> dict[str, int]:
    """The split's files; its line in the manifest."""
    tensors = shards.encode(tokenizer, texts, lambda done: progress(f"encode {name}", done, len(texts)))
    shards.write_split(folder, name, tensors, texts)
    return {
        **{unit: len(tensors[unit]) for unit in shards.UNITS},
        "bytes": int(tensors["document_bytes"].sum()),
        "tokens": len(tensors["tokens"]),
    }


def _check_free(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"prepare: expected a folder to write to; {folder} is a file; choose another")
    found = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in found if name not in (shards.MANIFEST, *shards.FILES, *shards.PAIR_FILES)]
    if foreign:
        raise FileExistsError(
            f"prepare: {folder} holds other files than data ({foreign[0]}); choose another folder"
        )
    if found and not overwrite:
        raise FileExistsError(
            f"prepare: {folder} already holds data; pass --overwrite to replace it, or choose another folder"
        )


def _check_enough(corpus: Corpus, config: DataConfig) -> None:
    """Every split must hold at least MIN_SPLIT_BYTES bytes."""
    sizes = {name: sum(len(text.encode()) for text in texts) for name, texts in corpus.splits.items()}
    found = sum(sizes.values())
    skipped = "; ".join(f"{r.source}: {r.detail}" for r in corpus.removed if r.reason == "not text")
    if not found:
        raise ValueError(
            f"prepare: expected text; {', '.join(config.paths)} has none in {corpus.counts['read']} files"
            + (f" ({skipped})" if skipped else "")
        )
    small = [name for name in SPLITS if sizes[name] < MIN_SPLIT_BYTES]
    if small:
        enough = max(ENOUGH_BYTES, ENOUGH_PIECES * config.max_document_bytes)
        remedy = f"give at least {enough:,} bytes" if found < enough else "give more text"
        shorter = max(found, ENOUGH_BYTES) // ENOUGH_PIECES
        if shorter < config.max_document_bytes:
            less = "" if found >= ENOUGH_BYTES else f"at least {ENOUGH_BYTES:,} and "
            remedy += f", or {less}cut shorter documents: --max-document-bytes {shorter}"
        raise ValueError(
            f"prepare: the corpus is too small to split: each of {', '.join(SPLITS)} "
            f"needs {MIN_SPLIT_BYTES:,} bytes; "
            f"found {found:,} bytes in {corpus.counts['pieces']} pieces, "
            f"{', '.join(f'{sizes[name]:,} for {name}' for name in small)}; {remedy}"
        )
