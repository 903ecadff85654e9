"""Where text comes from: files and folders, or the text that every Python installation carries."""

import ast
import codecs
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

EMBEDDED_SOURCES = ("pydoc_data.topics", "standard library docstrings")

# UTF-32 before UTF-16: the little-endian mark of the one begins with that of the other.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What compressed files begin with.
PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
CONTROL_BYTES = bytes(set(range(32)) - set(b"\t\n\v\f\r"))
HIGH_BYTES = bytes(range(128, 256))
MAX_HIGH_SHARE = 0.3  # of the bytes of a Latin-1 text; German and French prose stay under 0.1
HEAD_BYTES = 65536  # looked at before the rest of a file is read

NOT_LIBRARY = {"__pycache__", "dist-packages", "idle_test", "idlelib", "site-packages", "test", "tests"}
DOCSTRING_HOLDERS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Document:
    """A text, the place it was read from, and what its bytes were read as."""

    source: str
    text: str
    encoding: str = "utf-8"


@dataclass(frozen=True)
class Removed:
    """Something left out: where it stood, why, its size in bytes and, for paragraphs and pieces, the text."""

    source: str
    reason: str  # "not text", "empty", "exact duplicate" or "duplicate paragraph"
    detail: str
    bytes: int
    text: str | None = None


class NotText(ValueError):
    """The bytes are not text; the message says why."""


def decode(data: bytes) -> tuple[str, str]:
    """The text of a file's bytes, and its encoding: utf-8, utf-16, utf-32 or latin-1.

    The rule: a byte order mark decides (UTF-8, UTF-16, UTF-32); otherwise a NUL byte means that this is no
    text, and the bytes are UTF-8 if they decode as such, Latin-1 if they hold no control bytes and at most 30
    % of them lie outside ASCII. (The repair that follows turns Latin-1's control characters into Windows-1252
    and mends the UTF-8 of a file that only a stray byte kept from decoding.) Raises NotText for anything
    else.
    """
    for mark, encoding in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            try:
                return data.decode(encoding), encoding.removesuffix("-sig")
            except UnicodeDecodeError as error:
                raise NotText(f"marked as {encoding} but byte {error.start} does not decode") from None
    if b"\0" in data:
        raise NotText(f"NUL at byte {data.index(0)}{_packing(data)}")
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError as error:
        if len(data.translate(None, CONTROL_BYTES)) < len(data):
            raise NotText(
                f"not UTF-8 at byte {error.start}, and control bytes in it{_packing(data)}"
            ) from None
        if len(data) - len(data.translate(None, HIGH_BYTES)) > MAX_HIGH_SHARE * len(data):
            raise NotText(f"not UTF-8 at byte {error.start}, and too few ASCII bytes for Latin-1") from None
        return data.decode("latin-1"), "latin-1"


def _packing(data: bytes) -> str:
    found = next((name for start, name in PACKED.items() if data.startswith(start)), None)
    return f": packed by {found}, unpack it" if found else ""


def list_files(paths: Iterable[str | Path]) -> list[Path | Removed]:
    """The files under the given paths, and what in their folders cannot be read as one, in sorted order.

    Links are followed. Hidden files and folders are left out. A pipe among the paths counts as a file.
    Raises FileNotFoundError for a path that does not exist and ValueError for one that is neither file nor
    folder and for a folder with no file in it.
    """
    files: list[Path | Removed] = []
    for path in map(Path, paths):
        if path.is_file() or path.is_fifo():
            files.append(path)
        elif path.is_dir():
            found = sorted(
                _in_folder(path), key=lambda each: each if isinstance(each, Path) else Path(each.source)
            )
            if not found:
                raise ValueError(
                    f"prepare: expected text files in {path}; the folder is empty; put .txt files there"
                )
            files += found
        elif path.exists():
            raise ValueError(f"prepare: expected a text file, a folder or a pipe; {path} is {kind(path)}")
        else:
            raise FileNotFoundError(
                f"prepare: expected a text file or a folder; {path} {missing(path)}; check the path"
            )
    return files


def _in_folder(top: Path) -> Iterator[Path | Removed]:
    """The files in a folder and those below it, each folder once, whatever links lead to it."""
    seen: dict[str, str] = {}
    # Links wait for the folders that stand there themselves, so that texts go by the names of these.
    waiting = [str(top)]
    for start in waiting:
        for folder, subfolders, names in os.walk(start, onerror=_raise):
            real = os.path.realpath(folder)
            if real in seen:
                yield Removed(folder, "exact duplicate", f"same folder as {seen[real]}", 0)
                subfolders.clear()
                continue
            seen[real] = folder
            visible = [name for name in sorted(subfolders) if not name.startswith(".")]
            links = [name for name in visible if os.path.islink(os.path.join(folder, name))]
            waiting += [os.path.join(folder, name) for name in links]
            subfolders[:] = [name for name in visible if name not in links]
            for file in (Path(folder, name) for name in names if not name.startswith(".")):
                yield file if file.is_file() else Removed(str(file), "not text", kind(file), 0)


def kind(path: Path) -> str:
    """In words what a path is that is no file."""
    if path.is_symlink() and not path.exists():
        return f"a link to {os.readlink(path)}, which does not exist"
    if path.is_dir():
        return "a folder"
    return "a pipe" if path.is_fifo() else "a device or a socket"


def missing(path: Path) -> str:
    """In words that a path is not there, or that it is a link to what is not."""
    return f"is {kind(path)}" if path.is_symlink() else "does not exist"


def _raise(error: OSError) -> None:
    """A folder that cannot be listed is an error: os.walk would pass it over."""
    raise error


def read_files(files: Iterable[Path | Removed]) -> Iterator[Document | Removed]:
    """One Document a file, or Removed where the file is not text; what is Removed already stays so."""
    for path in files:
        if isinstance(path, Removed):
            yield path
            continue
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            marked = any(head.startswith(mark) for mark, _ in BYTE_ORDER_MARKS)
            data = head if b"\0" in head and not marked else head + file.read()
        try:
            yield Document(str(path), *decode(data))
        except NotText as error:
            yield Removed(str(path), "not text", str(error), max(path.stat().st_size, len(data)))


def read_embedded(library: Path | None = None) -> Iterator[Document]:
    """The embedded corpus: Python's language reference, then the docstrings of its standard library.

    One document a topic of pydoc_data.topics and one a module, which holds the module's docstrings in source
    order. Modules are parsed, never imported, but for pydoc_data.topics: that is data, one table of texts.
    Tests and installed packages are left out.
    library: the folder of the standard library; default that of the running Python.
    """
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(f"pydoc_data.topics/{name}", topics[name])
    library = library or Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if NOT_LIBRARY.isdisjoint(relative.parts) and (text := module_docstrings(path.read_bytes())):
            yield Document(f"stdlib/{relative.as_posix()}", text)


def module_docstrings(source: bytes) -> str:
    """All docstrings of a module in source order, without their indentation; "" if it does not parse."""
    with warnings.catch_warnings():
        # Old escapes such as "\d" are the business of the module's author.
        warnings.simplefilter("ignore")
        try:
            module = ast.parse(source)
        except SyntaxError:
            return ""
    return "\n\n".join(_docstrings(module))


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, DOCSTRING_HOLDERS) and (text := ast.get_docstring(node)):
        yield text
    for child in ast.iter_child_nodes(node):
        yield from _docstrings(child)
