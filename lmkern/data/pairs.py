"""Pairs of texts, a source and the target it is to become, from files."""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from lmkern.data.clean import SPLITS, FirstSeen, split_of
from lmkern.data.corpus import Removed, kind, missing
from lmkern.data.tokenizer import lone_surrogate

KEYS = ("source", "target")
REASONS = {"empty": "empty", "exact duplicate": "exact_duplicates", "held out": "held_out"}
COUNTS = ("read", *REASONS.values(), "pairs")


@dataclass(frozen=True)
class Pair:
    """A source, the target it is to become, and where both stand."""

    source: str
    target: str
    place: str

    @property
    def text(self) -> str:
        """Both sides as one text, which no other pair has."""
        return json.dumps([self.source, self.target], ensure_ascii=False)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of both sides."""
        return len(self.source.encode()) + len(self.target.encode())


@dataclass
class PairCorpus:
    """Pairs by split, and what was left out. sha256: of all that is left."""

    splits: dict[str, list[Pair]] = field(default_factory=lambda: {name: [] for name in SPLITS})
    removed: list[Removed] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTS, 0)))

    @property
    def sha256(self) -> str:
        digest = sha256()
        for name, pairs in self.splits.items():
            for pair in pairs:
                digest.update(f"{name}\n{pair.text}\n".encode())
        return digest.hexdigest()


def read_pairs(paths: Sequence[str | Path]) -> Iterator[Pair]:
    """The pairs of one JSON-lines file, or of two files whose lines belong together; .gz is unpacked.

    A line of JSON is {"source": text, "target": text}; other keys are left unread. White space around a side
    is dropped, all else stays as it is. Raises FileNotFoundError for a missing file; ValueError for more than
    two paths, text that is not UTF-8, a line that is no pair (its number is named) and files of unequal
    length.
    """
    if len(paths) == 1:
        path = Path(paths[0])
        for number, line in enumerate(_lines(path), 1):
            if line.strip():
                yield Pair(*_sides(line, f"{path}:{number}"), place=f"{path}:{number}")
    elif len(paths) == 2:
        sources, targets = (_lines(Path(path)) for path in paths)
        if len(sources) != len(targets):
            raise ValueError(
                f"read_pairs: two parallel files must have as many lines; {paths[0]} has {len(sources)} and "
                f"{paths[1]} has {len(targets)}"
            )
        for number, (source, target) in enumerate(zip(sources, targets, strict=True), 1):
            yield Pair(source.strip(), target.strip(), f"{paths[0]}:{number}")
    else:
        raise ValueError(
            f"read_pairs: expected one JSON-lines file or two parallel files, source before target; "
            f"got {len(paths)} paths"
        )


def clean_pairs(train: Sequence[str], validation: Sequence[str] = (), test: Sequence[str] = ()) -> PairCorpus:
    """The three splits, each from the files named for it; a split without files is held out of train.

    Of the training pairs those go that have an empty side, that stood before, and that stand in validation or
    test. Given validation and test pairs all stay, in their order: a score is a score of them all. Which pair
    is held out depends on nothing but its text. Raises ValueError for a given validation or test pair with an
    empty side, and for a split that is left without pairs.
    """
    corpus = PairCorpus()
    held: dict[str, str] = {}
    for name, paths in (("validation", validation), ("test", test)):
        for pair in read_pairs(paths) if paths else ():
            if not (pair.source and pair.target):
                raise ValueError(
                    f"prepare: {pair.place}: a side of this {name} pair is empty; remove the pair or fill it"
                )
            corpus.counts["read"] += 1
            held.setdefault(pair.text, pair.place)
            corpus.splits[name].append(pair)
    seen = FirstSeen()
    for pair in read_pairs(train):
        corpus.counts["read"] += 1
        if not (pair.source and pair.target):
            _remove(corpus, pair, "empty", "a side is empty")
        elif pair.text in held:
            _remove(corpus, pair, "held out", f"also at {held[pair.text]}")
        elif earlier := seen.earlier(pair.text, pair.place):
            _remove(corpus, pair, "exact duplicate", f"same pair at {earlier}")
        else:
            name = split_of(pair.text)
            given = {"train": True, "validation": bool(validation), "test": bool(test)}
            corpus.splits["train" if given[name] else name].append(pair)
    corpus.counts["pairs"] = sum(map(len, corpus.splits.values()))
    if empty := [name for name, pairs in corpus.splits.items() if not pairs]:
        raise ValueError(
            f"prepare: no pairs for {', '.join(empty)}: {corpus.counts['read']} were read; give more, or "
            "name files for validation and test"
        )
    return corpus


def _remove(corpus: PairCorpus, pair: Pair, reason: str, detail: str) -> None:
    corpus.counts[REASONS[reason]] += 1
    corpus.removed.append(Removed(pair.place, reason, detail, pair.bytes, pair.text))


def _lines(path: Path) -> list[str]:
    """The lines of a file: what a line feed ends, and nothing else does."""
    if not path.exists():
        raise FileNotFoundError(f"read_pairs: expected a file of pairs; {path} {missing(path)}")
    if not (path.is_file() or path.is_fifo()):
        raise ValueError(f"read_pairs: expected a file of pairs; {path} is {kind(path)}")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = data.decode("utf-8-sig").split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"read_pairs: {path} must be UTF-8 text, packed by gzip or not: {error}") from None
    return lines[:-1] if lines[-1] == "" else lines


def _sides(line: str, place: str) -> tuple[str, str]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"read_pairs: {place} is not JSON: {error}. Of parallel files name both, source before target"
        ) from None
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in KEYS):
        got = f"keys {', '.join(record)}" if isinstance(record, dict) else type(record).__name__
        raise ValueError(f'read_pairs: {place} must be {{"source": text, "target": text}}; got {got}')
    for key in KEYS:
        if (at := lone_surrogate(record[key])) is not None:
            raise ValueError(
                f"read_pairs: {place}: {key} must be Unicode text; got half of a surrogate pair, "
                f"{record[key][at]!a}, at character {at}: put the character in its place"
            )
    return record["source"].strip(), record["target"].strip()
