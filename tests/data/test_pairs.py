import gzip
import json
import os
import threading
from pathlib import Path

import pytest
import torch

from lmkern.data import DataConfig, PairDataset, load, prepare
from lmkern.data.pairs import clean_pairs, read_pairs

PAIRS = [(f"Quelle {n} ä.", f"Source {n} \u2028 é.") for n in range(40)]


def write_jsonl(path: Path, pairs: list[tuple[str, str]]) -> str:
    lines = (json.dumps({"source": source, "target": target}) + "\n" for source, target in pairs)
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def write_parallel(folder: Path, name: str, pairs: list[tuple[str, str]], *, packed: bool) -> tuple[str, str]:
    paths = []
    for side, ending in enumerate(("de", "en")):
        text = "".join(pair[side] + "\n" for pair in pairs).encode()
        path = folder / f"{name}.{ending}{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(text) if packed else text)
        paths.append(str(path))
    return paths[0], paths[1]


def sides(paths: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(pair.source, pair.target) for pair in read_pairs(paths)]


def test_json_lines_and_parallel_files_give_the_same_pairs(tmp_path: Path) -> None:
    # Only a line feed ends a line: U+2028 stands inside a target.
    assert sides((write_jsonl(tmp_path / "a.jsonl", PAIRS),)) == PAIRS
    for packed in (False, True):
        assert sides(write_parallel(tmp_path, "a", PAIRS, packed=packed)) == PAIRS


def test_white_space_around_a_side_is_dropped_and_all_else_stays(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [(" A  b\t", "two\nlines \r\n")])
    assert sides((path,)) == [("A  b", "two\nlines")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"source": "a"', r"a\.jsonl:2 is not JSON"),
        ('{"source": "a"}', r'a\.jsonl:2 must be .*"target": text.*; got keys source'),
        ('{"source": "a", "target": 3}', r"a\.jsonl:2 must be"),
        ('["a", "b"]', r"a\.jsonl:2 must be .*; got list"),
        (
            '{"source": "a \\ud800", "target": "b"}',
            r"a\.jsonl:2: source must be Unicode.*'.ud800', at character 2",
        ),
        ('{"source": "a", "target": "\\udc00"}', r"a\.jsonl:2: target must be Unicode text"),
    ],
)
def test_a_line_that_is_no_pair_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"source": "a", "target": "b"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        list(read_pairs([path]))


def test_what_json_spells_as_a_pair_of_surrogates_is_a_character(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"source": "\\ud83d\\ude00", "target": "b"}\n')
    assert sides((str(path),)) == [("\U0001f600", "b")]


def test_pairs_are_read_from_pipes(tmp_path: Path) -> None:
    for name in ("de", "en"):
        os.mkfifo(tmp_path / name)
        threading.Thread(
            target=(tmp_path / name).write_text, args=(f"{name} 1\n{name} 2\n",), daemon=True
        ).start()
    assert sides((str(tmp_path / "de"), str(tmp_path / "en"))) == [("de 1", "en 1"), ("de 2", "en 2")]
    with pytest.raises(ValueError, match=f"expected a file of pairs; {tmp_path} is a folder"):
        list(read_pairs([tmp_path]))


def test_bad_files_are_named(tmp_path: Path) -> None:
    short, long = tmp_path / "short.de", tmp_path / "long.en"
    short.write_text("a\nb\n")
    long.write_text("a\nb\nc")
    with pytest.raises(ValueError, match=r"short\.de has 2 and .*long\.en has 3"):
        list(read_pairs([short, long]))
    with pytest.raises(ValueError, match="got 3 paths"):
        list(read_pairs([short, long, short]))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl does not exist"):
        list(read_pairs([tmp_path / "nowhere.jsonl"]))
    (tmp_path / "deep.jsonl").write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"deep\.jsonl.* is not JSON"):
        list(read_pairs([tmp_path / "deep.jsonl"]))
    packed = gzip.compress(bytes(range(256)) * 4)
    for name, data in (
        ("latin.jsonl", b"\xe4\n"),
        ("cut.gz", gzip.compress(b"a" * 999)[:-9]),
        ("no.gz", b"a"),
        ("damaged.gz", packed[:20] + bytes(byte ^ 255 for byte in packed[20:24]) + packed[24:]),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} must be UTF-8 text"):
            list(read_pairs([tmp_path / name]))


def test_cleaning_removes_from_train_alone_and_says_why(tmp_path: Path) -> None:
    twice = [("der Hund", "the dog")] * 2
    train = write_jsonl(tmp_path / "train.jsonl", [*twice, ("", "empty"), ("held", "out"), ("ein", "one")])
    held = write_jsonl(tmp_path / "held.jsonl", [("held", "out"), *twice])
    corpus = clean_pairs((train,), (held,), (held,))
    assert [(p.source, p.target) for p in corpus.splits["train"]] == [
        ("der Hund", "the dog"),
        ("ein", "one"),
    ][1:]
    # What is scored is scored as it is, in its order.
    assert [p.source for p in corpus.splits["test"]] == ["held", "der Hund", "der Hund"]
    assert corpus.counts == {
        "read": 11, "empty": 1, "held_out": 3, "exact_duplicates": 0, "pairs": 7,
    }  # fmt: skip
    assert [r.detail for r in corpus.removed][2:] == ["a side is empty", f"also at {held}:1"]
    with pytest.raises(ValueError, match=r"train\.jsonl:3: a side of this test pair is empty"):
        clean_pairs((held,), (held,), (train,))


def test_splits_without_files_are_held_out_by_content(tmp_path: Path) -> None:
    many = [(f"s{n}", f"t{n}") for n in range(300)]
    corpus = clean_pairs((write_jsonl(tmp_path / "a.jsonl", many),))
    sizes = {name: len(pairs) for name, pairs in corpus.splits.items()}
    assert sum(sizes.values()) == 300
    assert 15 <= sizes["validation"] <= 45 and 15 <= sizes["test"] <= 45
    again = clean_pairs((write_jsonl(tmp_path / "b.jsonl", many[::-1]),))
    assert {p.text for p in again.splits["test"]} == {p.text for p in corpus.splits["test"]}
    with pytest.raises(ValueError, match="no pairs for validation, test: 1 were read"):
        clean_pairs((write_jsonl(tmp_path / "c.jsonl", [("s0", "t0")]),))


def test_prepared_pairs_come_back_as_text_and_as_tokens(tmp_path: Path) -> None:
    train = write_parallel(tmp_path, "train", PAIRS, packed=True)
    held = write_parallel(tmp_path, "held", [("Quelle", "Source"), ("ä", "é")], packed=False)
    config = DataConfig(vocab_size=300, train=train, validation=held, test=held)
    manifest = prepare(config, tmp_path / "data")
    assert prepare(config, tmp_path / "again") == manifest
    assert DataConfig(**manifest["config"]) == config
    dataset = load(tmp_path / "data")
    assert isinstance(dataset, PairDataset)
    assert dataset.train.text() == PAIRS
    assert dataset.test.text() == [("Quelle", "Source"), ("ä", "é")]
    for index, pair in enumerate(PAIRS):
        for side, text in enumerate(pair):
            *tokens, end = dataset.train.tokens(side, index)
            assert dataset.tokenizer.decode(tokens) == text
            assert (end, len(tokens)) == (0, dataset.train.lengths[index, side])
    assert manifest["splits"]["train"] == {
        "pairs": 40,
        "bytes": sum(len(side.encode()) for pair in PAIRS for side in pair),
        "source_tokens": int(dataset.train.lengths[:, 0].sum()),
        "target_tokens": int(dataset.train.lengths[:, 1].sum()),
    }
    assert dataset.train.source.dtype == torch.uint16
    (tmp_path / "data" / "train.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"train\.jsonl is truncated or altered"):
        load(tmp_path / "data")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": ("a", "b", "c")}, "train must be one JSON-lines file or two parallel files"),
        ({"train": ("a",), "paths": ("b",)}, "not both"),
        ({"test": ("a",)}, "need train"),
        ({"train": "a.jsonl"}, "train must be a sequence of paths"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)
