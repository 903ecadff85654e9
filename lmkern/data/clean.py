"""From raw documents to the corpus: repaired, without duplicates, cut to size and split three ways."""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from typing import Any

from lmkern.data.corpus import Document, Removed

SPLITS = ("train", "validation", "test")
TRAIN_SHARE, VALIDATION_SHARE = 0.8, 0.1  # the rest is the test split

# A paragraph shorter than this many characters may stand in the corpus any number of times: a speaker's name,
# "Returns:", a heading.
MIN_DUPLICATE_CHARACTERS = 32

# Between two documents of a text file, and never inside one: cleaning drops control characters.
DOCUMENT_SEPARATOR = "\n\x1e\n"

CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]")
LINE_ENDS = re.compile(r"\r\n?|[\v\f]")
BLANK_LINES = re.compile(r"\n{3,}")


@functools.cache
def _repair_config() -> Any:
    from ftfy import TextFixerConfig

    # Only damage is repaired: curly quotes, ligatures, the full-width forms of Chinese and Japanese text, and
    # HTML that may be what the text is about are left alone.
    return TextFixerConfig(
        uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False, unescape_html=False
    )


def repair(text: str) -> str:
    """The text with its encoding mended by ftfy: text decoded with the wrong table, lone surrogates, NFC."""
    import ftfy

    return ftfy.fix_text(text, _repair_config())


def normalise(text: str) -> str:
    """The text with tidy white space.

    Line ends are "\\n", control characters other than "\\n" and "\\t" are gone, no line ends with white
    space, the text neither begins nor ends with a blank line and has no two of them together. Indentation
    stays.
    """
    text = CONTROL.sub("", LINE_ENDS.sub("\n", text))
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return BLANK_LINES.sub("\n\n", text).strip("\n")


def cut(text: str, max_bytes: int, separators: tuple[str, ...] = ("\n\n", "\n", " ")) -> list[str]:
    """Pieces of at most max_bytes bytes of UTF-8, filled from the front.

    The text is cut between paragraphs; a longer paragraph between lines; a longer line between words; a
    longer word after the last whole character. What separated two pieces belongs to neither.
    """
    if len(text.encode()) <= max_bytes:
        return [text]
    if not separators:
        return _cut_characters(text, max_bytes)
    separator, finer = separators[0], separators[1:]
    pieces: list[str] = []
    current: list[str] = []
    size = 0
    for part in text.split(separator):
        part_size = len(part.encode())
        if current and size + len(separator) + part_size > max_bytes:
            pieces.append(separator.join(current))
            current, size = [], 0
        if part_size > max_bytes:
            *whole, part = cut(part, max_bytes, finer)
            part_size = len(part.encode())
            pieces += whole
        size += part_size + (len(separator) if current else 0)
        current.append(part)
    pieces.append(separator.join(current))
    return pieces


def _cut_characters(text: str, max_bytes: int) -> list[str]:
    data = text.encode()
    pieces = []
    start = 0
    while start < len(data):
        end = min(start + max_bytes, len(data))
        # 10xxxxxx continues a character.
        while end < len(data) and data[end] & 0xC0 == 0x80:
            end -= 1
        pieces.append(data[start:end].decode())
        start = end
    return pieces


def split_of(text: str) -> str:
    """The split a piece belongs to: its hash as a number in [0, 1), compared with the shares.

    It depends on nothing but the text, so that a piece stays where it is as the corpus grows.
    """
    number = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
    if number < TRAIN_SHARE:
        return "train"
    return "validation" if number < TRAIN_SHARE + VALIDATION_SHARE else "test"


class FirstSeen:
    """Remembers, for each text, the source that had it first. Keeps 16 bytes a text."""

    def __init__(self) -> None:
        self._source: dict[bytes, str] = {}

    def earlier(self, text: str, source: str) -> str | None:
        """The source that had this text before, or None and the text is remembered."""
        key = blake2b(text.encode(), digest_size=16).digest()
        if key in self._source:
            return self._source[key]
        self._source[key] = source
        return None


REASONS = {
    "not text": "not_text",
    "empty": "empty",
    "exact duplicate": "exact_duplicates",
    "duplicate paragraph": "duplicate_paragraphs",
}
COUNTS = ("read", "repaired", "cut", "pieces", *REASONS.values())


@dataclass
class Corpus:
    """The cleaned corpus. splits: pieces of text in reading order. sha256 and bytes are those of the cleaned
    documents before they are cut, each followed by DOCUMENT_SEPARATOR (not counted in bytes). encodings: the
    sources that were read as anything but UTF-8, by what they were read as."""

    splits: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in SPLITS})
    removed: list[Removed] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTS, 0)))
    bytes: int = 0
    sha256: str = ""
    encodings: dict[str, list[str]] = field(default_factory=dict)

    def remove(self, removed: Removed) -> None:
        """Count something that was left out, and keep it on record."""
        self.counts[REASONS[removed.reason]] += 1
        self.removed.append(removed)


def clean(
    documents: Iterable[Document | Removed],
    max_document_bytes: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Corpus:
    """Repairs, normalises, drops exact duplicates, cuts, drops duplicate paragraphs and splits.

    A paragraph of at least MIN_DUPLICATE_CHARACTERS characters is in the result once (white space aside), and
    so is every piece: no such paragraph and no piece is in two splits. The split is decided on the piece as
    it was cut, before paragraphs are dropped, so that no other text has a say in it.

    counts: read (files or embedded documents), not_text, repaired (changed by ftfy), empty, exact_duplicates
    (documents and pieces), cut (documents that were), duplicate_paragraphs, pieces (what is left).
    progress: called with the number of documents done.
    """
    corpus = Corpus()
    digest = sha256()
    seen_documents, seen_pieces, seen_paragraphs = FirstSeen(), FirstSeen(), FirstSeen()
    for done, document in enumerate(documents, 1):
        corpus.counts["read"] += 1
        progress(done)
        if isinstance(document, Removed):
            corpus.remove(document)
            continue
        if document.encoding != "utf-8":
            corpus.encodings.setdefault(document.encoding, []).append(document.source)
        source, raw = document.source, LINE_ENDS.sub("\n", document.text)
        repaired = repair(raw)
        corpus.counts["repaired"] += repaired != raw
        text = normalise(repaired)
        size = len(text.encode())
        if not text:
            corpus.remove(Removed(source, "empty", "white space only", len(repaired.encode())))
            continue
        if earlier := seen_documents.earlier(text, source):
            corpus.remove(Removed(source, "exact duplicate", f"same text as {earlier}", size))
            continue
        digest.update((text + DOCUMENT_SEPARATOR).encode())
        corpus.bytes += size

        pieces = cut(text, max_document_bytes)
        corpus.counts["cut"] += len(pieces) > 1
        for piece in pieces:
            kept, dropped = drop_duplicates(piece, source, seen_paragraphs)
            for removed in dropped:
                corpus.remove(removed)
            if not kept:
                continue
            if earlier := seen_pieces.earlier(kept, source):
                detail = f"same piece as in {earlier}"
                corpus.remove(Removed(source, "exact duplicate", detail, len(kept.encode()), kept))
                continue
            corpus.splits[split_of(piece)].append(kept)
            corpus.counts["pieces"] += 1
    corpus.sha256 = digest.hexdigest()
    return corpus


def drop_duplicates(piece: str, source: str, seen: FirstSeen) -> tuple[str, list[Removed]]:
    """What is left of a piece without the long paragraphs that were seen before, and those paragraphs.

    Long: of at least MIN_DUPLICATE_CHARACTERS characters, white space aside. seen learns the others.
    """
    kept: list[str] = []
    dropped: list[Removed] = []
    for paragraph in piece.split("\n\n"):
        key = " ".join(paragraph.split())
        earlier = seen.earlier(key, source) if len(key) >= MIN_DUPLICATE_CHARACTERS else None
        if earlier:
            size = len(paragraph.encode())
            dropped.append(Removed(source, "duplicate paragraph", f"also in {earlier}", size, paragraph))
        elif key:
            kept.append(paragraph)
    return "\n\n".join(kept).strip("\n"), dropped
