import codecs
import errno
import gzip
import os
import threading
from pathlib import Path

import pytest

from lmkern.data.corpus import (
    Document,
    NotText,
    Removed,
    decode,
    list_files,
    module_docstrings,
    read_embedded,
    read_files,
)

TEXT = "Füße, 世界, naïve"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_files_decode_with_or_without_a_byte_order_mark(encoding: str) -> None:
    assert decode(TEXT.encode(encoding)) == (TEXT, encoding.removesuffix("-sig"))


def test_a_byte_order_mark_gives_the_byte_order() -> None:
    assert decode(codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be")) == (TEXT, "utf-16")
    assert decode(codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be")) == (TEXT, "utf-32")


def test_prose_in_latin_1_decodes() -> None:
    text = "Die Straße führt über die Brücke."
    assert decode(text.encode("latin-1")) == (text, "latin-1")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"text\0more", "NUL at byte 4$"),
        (gzip.compress(b"text", mtime=0), "NUL at byte 3: packed by gzip, unpack it"),
        (b"PK\x03\x04\xff\xff\x01", "control bytes in it: packed by zip, unpack it"),
        (codecs.BOM_UTF16_LE + b"\x00\xd8x", "marked as utf-16"),
        (b"\x89PNG\x1a\x0a rest", "control bytes"),
        ("世界。".encode()[:-1], "too few ASCII bytes"),
    ],
)
def test_bytes_that_are_no_text_are_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(NotText, match=reason):
        decode(data)


def test_folders_are_read_in_sorted_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/.hidden", ".git/config", "c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = [file.relative_to(tmp_path).as_posix() for file in list_files([tmp_path])]
    assert found == ["a/z.md", "b.txt", "c"]


def test_paths_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    assert list_files([tmp_path / "b", tmp_path / "a"]) == [tmp_path / "b", tmp_path / "a"]


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"prepare: expected a text file or a folder; .*/nowhere does not exist"
    ):
        list_files([tmp_path / "nowhere"])


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"prepare: expected text files in {tmp_path}; the folder is empty"):
        list_files([tmp_path])


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(path.name)


def test_links_are_followed_and_no_folder_is_read_twice(tmp_path: Path) -> None:
    """Into another folder, out of it into that of the link, and round in a circle."""
    src, other = tmp_path / "src", tmp_path / "other"
    for path in (src / "z.txt", src / "sub" / "y.txt", other / "deep" / "x.txt", other / "w.txt"):
        write(path)
    # A link that comes first in the order does not take the name of the folder itself.
    (src / "again").symlink_to("sub")
    (src / "linked").symlink_to("../other")
    (src / "sub" / "round").symlink_to("..")
    (other / "back").symlink_to("../src/sub")
    (src / ".hidden").symlink_to("../other")
    (src / "file.txt").symlink_to("../other/w.txt")
    found = list_files([src])
    assert [path.relative_to(src).as_posix() for path in found if isinstance(path, Path)] == [
        "file.txt",
        "linked/deep/x.txt",
        "linked/w.txt",
        "sub/y.txt",
        "z.txt",
    ]
    left = {(Path(each.source), each.reason, each.detail) for each in found if isinstance(each, Removed)}
    same = "exact duplicate"
    assert left == {
        (src / "again", same, f"same folder as {src / 'sub'}"),
        (src / "linked" / "back", same, f"same folder as {src / 'sub'}"),
        (src / "sub" / "round", same, f"same folder as {src}"),
    }


def test_a_folder_of_a_link_alone_is_read(tmp_path: Path) -> None:
    write(tmp_path / "other" / "a.txt")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "link").symlink_to("../other")
    assert list_files([tmp_path / "src"]) == [tmp_path / "src" / "link" / "a.txt"]


def test_what_is_no_file_is_left_out_with_the_reason(tmp_path: Path) -> None:
    write(tmp_path / "b.txt")
    (tmp_path / "a.txt").symlink_to("nowhere")
    (tmp_path / "d").symlink_to("d")
    os.mkfifo(tmp_path / "c")
    found = list(read_files(list_files([tmp_path])))
    assert found == [
        Removed(str(tmp_path / "a.txt"), "not text", "a link to nowhere, which does not exist", 0),
        Document(str(tmp_path / "b.txt"), "b.txt"),
        Removed(str(tmp_path / "c"), "not text", "a pipe", 0),
        Removed(str(tmp_path / "d"), "not text", "a link to d, which does not exist", 0),
    ]
    with pytest.raises(FileNotFoundError, match=r"a\.txt is a link to nowhere, which does not exist"):
        list_files([tmp_path / "a.txt"])
    with pytest.raises(ValueError, match="expected a text file, a folder or a pipe; /dev/null is a device"):
        list_files(["/dev/null"])


@pytest.mark.parametrize("data", [b"words", b"\x7fELF\0\0"])
def test_a_pipe_is_read(tmp_path: Path, data: bytes) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_bytes, args=(data,), daemon=True).start()
    (found,) = read_files(list_files([pipe]))
    expected = Removed(str(pipe), "not text", "NUL at byte 4", 6)
    assert found == (Document(str(pipe), "words") if data == b"words" else expected)


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "open.txt").write_text("text")
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def guarded(path: str) -> object:
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(PermissionError, match="closed"):
        list_files([tmp_path])


def test_a_file_that_is_no_text_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\x7fELF\0\0" + bytes(100_000))
    (tmp_path / "b.txt").write_text("words")
    removed, document = read_files(list_files([tmp_path]))
    assert removed == Removed(str(tmp_path / "a.bin"), "not text", "NUL at byte 4", 100_006)
    assert document == Document(str(tmp_path / "b.txt"), "words")


def test_docstrings_come_in_source_order_without_indentation_and_nothing_runs() -> None:
    source = b'''"""Module."""
raise SystemExit
class First:
    """Class.

        indented
    end
    """
    def method(self):
        r"""Method \\d."""
        def inner(): "Inner."
        x = "no docstring"
async def last(): "Last."
'''
    expected = ["Module.", "Class.\n\n    indented\nend", r"Method \d.", "Inner.", "Last."]
    assert module_docstrings(source) == "\n\n".join(expected)


def test_a_module_that_does_not_parse_has_no_docstrings() -> None:
    assert module_docstrings(b"print 'Python 2'") == ""


def test_the_embedded_corpus_leaves_out_tests_and_packages(tmp_path: Path) -> None:
    for name in ("json/tool.py", "test/support.py", "json/tests/x.py", "site-packages/y.py", "idlelib/z.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'"""{name}"""')
    sources = [document.source for document in read_embedded(tmp_path)]
    assert [source for source in sources if source.startswith("stdlib")] == ["stdlib/json/tool.py"]


def test_the_embedded_corpus_of_this_python_is_megabytes_of_reference_and_docstrings() -> None:
    documents = list(read_embedded())
    assert {"pydoc_data.topics/assert", "stdlib/argparse.py"} <= {document.source for document in documents}
    assert (
        1_500_000 < sum(len(document.text.encode("utf-8", "replace")) for document in documents) < 6_000_000
    )
