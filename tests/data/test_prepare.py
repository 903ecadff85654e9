import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from lmkern.data import DataConfig, load, prepare

WRITTEN = {
    "manifest.json",
    "tokenizer.json",
    "removed.jsonl",
    *(f"{split}.{ending}" for split in ("train", "validation", "test") for ending in ("safetensors", "txt")),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_manifest_says_what_is_in_the_folder(data_folder: Path, config: DataConfig) -> None:
    manifest = json.loads((data_folder / "manifest.json").read_text())
    assert {path.name for path in data_folder.iterdir()} == WRITTEN
    assert set(manifest["files"]) == WRITTEN - {"manifest.json"}
    for name, entry in manifest["files"].items():
        data = (data_folder / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert DataConfig(**manifest["config"]) == config
    assert manifest["config"] == {
        "paths": list(config.paths),
        "vocab_size": 400,
        "max_document_bytes": 1024,
        "train": [],
        "validation": [],
        "test": [],
    }
    assert manifest["corpus"]["files"] == manifest["counts"]["read"] == 80
    dataset = load(data_folder)
    for name, entry in manifest["splits"].items():
        split = getattr(dataset, name)
        assert entry == {
            "documents": len(split.documents),
            "paragraphs": len(split.paragraphs),
            "sentences": len(split.sentences),
            "bytes": split.bytes,
            "tokens": len(split.tokens),
        }
    assert sum(entry["documents"] for entry in manifest["splits"].values()) == manifest["counts"]["pieces"]
    assert manifest["vocab_size"] == dataset.tokenizer.get_vocab_size() == 400


def test_no_text_is_lost(data_folder: Path, config: DataConfig) -> None:
    dataset = load(data_folder)
    kept = [text for split in (dataset.train, dataset.validation, dataset.test) for text in split.text()]
    removed = [
        json.loads(line)["text"] or "" for line in (data_folder / "removed.jsonl").read_text().splitlines()
    ]
    source = [path.read_text() for path in Path(config.paths[0]).iterdir()]
    assert sorted(" ".join(kept + removed).split()) == sorted(" ".join(source).split())


def test_the_same_text_gives_the_same_bytes_in_another_process(
    data_folder: Path, config: DataConfig, tmp_path: Path
) -> None:
    code = (
        "import sys; from lmkern.data import *; prepare(DataConfig((sys.argv[1],), 400, 1024), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, config.paths[0], str(tmp_path / "again")], check=True)
    assert contents(tmp_path / "again") == contents(data_folder)


def test_the_tokenizer_sees_the_train_split_only(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def spy(texts: list[str], vocab_size: int) -> Tokenizer:
        seen.extend(texts)
        return train(texts, vocab_size)

    # lmkern.data.prepare, the attribute, is the function.
    module = importlib.import_module("lmkern.data.prepare")
    train = module.train_tokenizer
    monkeypatch.setattr(module, "train_tokenizer", spy)
    prepare(config, tmp_path / "data")
    assert seen == load(tmp_path / "data").train.text()


def test_a_file_whose_name_is_no_text_is_read_with_its_folder_and_not_by_its_name(
    config: DataConfig, tmp_path: Path
) -> None:
    name = os.fsdecode(b"l\xe4uf")
    folder = tmp_path / "texts"
    shutil.copytree(config.paths[0], folder)
    try:
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0")
    except OSError:
        pytest.skip("a file system whose names are text")
    prepare(replace(config, paths=(str(folder),)), tmp_path / "data")
    removed = (tmp_path / "data" / "removed.jsonl").read_text(encoding="utf-8").splitlines()
    assert str(folder / name) in [json.loads(line)["source"] for line in removed]
    with pytest.raises(ValueError, match=r"whose names are text; got '.*l.udce4uf': rename it"):
        replace(config, paths=(str(folder / name),))


def test_one_file_is_enough(config: DataConfig, tmp_path: Path) -> None:
    files = sorted(Path(config.paths[0]).iterdir())
    (tmp_path / "one.txt").write_text("\n\n".join(path.read_text() for path in files))
    manifest = prepare(DataConfig((str(tmp_path / "one.txt"),), 300, 512), tmp_path / "data")
    assert manifest["corpus"]["name"] == "one.txt"
    assert manifest["counts"]["cut"] == 1
    assert all(entry["documents"] > 1 for entry in manifest["splits"].values())


def test_a_file_that_is_no_text_is_named_skipped_and_counted(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0")
    manifest = prepare(DataConfig((*config.paths, str(tmp_path / "image.png")), 300), tmp_path / "data")
    assert manifest["counts"]["not_text"] == 1
    removed = [json.loads(line) for line in (tmp_path / "data" / "removed.jsonl").read_text().splitlines()]
    assert [entry["source"] for entry in removed if entry["reason"] == "not text"] == [
        str(tmp_path / "image.png")
    ]


def test_a_corpus_from_a_pipe_is_called_so(config: DataConfig, corpus_folder: Path, tmp_path: Path) -> None:
    text = "\n\n".join(path.read_text() for path in sorted(corpus_folder.iterdir()))
    (tmp_path / "text").write_text(text)
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_text, args=(text,), daemon=True).start()
    found = [
        prepare(replace(config, paths=(str(tmp_path / name),)), tmp_path / f"of {name}")["corpus"]
        for name in ("text", "pipe")
    ]
    assert found[0]["sha256"] == found[1]["sha256"]
    assert [corpus["name"] for corpus in found] == ["text", "a pipe"]


def test_progress_reaches_its_total(config: DataConfig, tmp_path: Path) -> None:
    last: dict[str, tuple[int, int | None]] = {}
    prepare(
        config, tmp_path / "data", progress=lambda stage, done, total: last.update({stage: (done, total)})
    )
    assert list(last) == [
        "read",
        "train tokenizer",
        "encode train",
        "encode validation",
        "encode test",
        "write",
    ]
    assert all(done == total for done, total in last.values())
    assert last["read"] == (80, 80)


def test_a_folder_that_holds_data_is_refused_and_replaced_on_request(
    config: DataConfig, tmp_path: Path
) -> None:
    prepare(config, tmp_path / "data")
    before = contents(tmp_path / "data")
    other = DataConfig(config.paths, 300, 1024)
    with pytest.raises(FileExistsError, match=r"prepare: .* already holds data; pass --overwrite"):
        prepare(other, tmp_path / "data")
    assert contents(tmp_path / "data") == before
    prepare(other, tmp_path / "data", overwrite=True)
    assert load(tmp_path / "data").manifest["vocab_size"] == 300
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_folder_with_other_files_is_never_replaced(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds other files than data \(thesis\.tex\)"):
        prepare(config, tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_is_used(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    prepare(config, tmp_path / "data")
    load(tmp_path / "data")


def test_a_folder_that_cannot_be_written_is_refused_before_all_work(
    config: DataConfig, tmp_path: Path
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("work was begun")

    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        prepare(config, tmp_path / "file" / "data", progress=fail)


@pytest.mark.parametrize("size", [100, 5_000, 40_000])
def test_a_full_disk_names_the_folder_and_leaves_nothing(
    config: DataConfig, tmp_path: Path, full_disk: Any, size: int
) -> None:
    with full_disk(size), pytest.raises(OSError, match="too large") as refused:
        prepare(config, tmp_path / "data")
    assert str(refused.value.filename).startswith(str(tmp_path / "data"))
    assert not list(tmp_path.iterdir())


def test_overwrite_is_true_or_false(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="prepare: overwrite must be True or False; got 'no'"):
        prepare(config, tmp_path / "data", overwrite="no")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_prepare_leaves_what_was_there(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    prepare(config, tmp_path / "old")
    before = contents(tmp_path / "old")

    def interrupt(*_: Any) -> None:
        raise error

    monkeypatch.setattr(importlib.import_module("lmkern.data.prepare"), "checksum", interrupt)
    with pytest.raises(error):
        prepare(config, tmp_path / "new")
    with pytest.raises(error):
        prepare(config, tmp_path / "old", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert contents(tmp_path / "old") == before


def test_a_corpus_too_small_to_split_says_what_it_has_and_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "small.txt").write_text("A few words only.\n")
    with pytest.raises(
        ValueError,
        match=r"too small to split: .* found 17 bytes in 1 pieces, .*; give at least 524,288 bytes, or "
        r"at least 40,960 and cut shorter documents: --max-document-bytes 640$",
    ):
        prepare(DataConfig((str(tmp_path / "small.txt"),)), tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("max_document_bytes", [64, 640])
def test_a_small_corpus_of_short_documents_is_asked_for_more_than_it_has(
    tmp_path: Path, max_document_bytes: int
) -> None:
    (tmp_path / "small.txt").write_text("\n\n".join(f"Paragraph {number}." for number in range(300)))
    with pytest.raises(ValueError, match=r"; give at least 40,960 bytes$"):
        prepare(DataConfig((str(tmp_path / "small.txt"),), 300, max_document_bytes), tmp_path / "data")


def test_the_document_size_offered_for_a_small_corpus_works(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(
        "\n\n".join(path.read_text() for path in sorted(Path(config.paths[0]).iterdir()))
    )
    with pytest.raises(ValueError, match=r"or cut shorter documents: --max-document-bytes \d+$") as caught:
        prepare(DataConfig((str(tmp_path / "one.txt"),), 300, 50_000), tmp_path / "data")
    offered = int(str(caught.value).rsplit(" ", 1)[1])
    prepare(DataConfig((str(tmp_path / "one.txt"),), 300, offered), tmp_path / "data")


def test_a_folder_without_text_names_what_was_skipped(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.bin").write_bytes(bytes(10))
    (tmp_path / "in" / "blank.txt").write_text("\n \n")
    with pytest.raises(
        ValueError, match=r"prepare: expected text; .* has none in 2 files \(.*a\.bin: NUL at byte 0\)"
    ):
        prepare(DataConfig((str(tmp_path / "in"),)), tmp_path / "data")


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"vocab_size": 256}, "vocab_size must be at least 257"),
        ({"max_document_bytes": 10}, "max_document_bytes must be at least 64"),
        ({"paths": "text.txt"}, "paths must be a sequence of paths"),
    ],
)
def test_a_config_out_of_range_is_refused(field: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"DataConfig: {message}"):
        DataConfig(**field)
