import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lmkern.data import Dataset, Split, load
from lmkern.data.shards import MANIFEST, UNITS, encode, token_starts
from lmkern.data.spans import sentence_starts
from lmkern.data.tokenizer import train_tokenizer
from lmkern.files import checksum

SPLITS = ("train", "validation", "test")
MAPS = Path("/proc/self/maps")


@pytest.fixture
def copy(data_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data_folder, tmp_path / "data"))


def decoded(dataset: Dataset, split: Split, starts: torch.Tensor) -> list[str]:
    ends = [*starts[1:].tolist(), len(split.tokens)]
    pairs = zip(starts.tolist(), ends, strict=True)
    return [dataset.tokenizer.decode(split.tokens[start:end].tolist()) for start, end in pairs]


@pytest.mark.parametrize("name", SPLITS)
def test_the_tokens_of_a_document_are_its_text_and_the_end_of_text(dataset: Dataset, name: str) -> None:
    split = getattr(dataset, name)
    assert decoded(dataset, split, split.documents) == split.text()
    ends = torch.cat([split.documents[1:], torch.tensor([len(split.tokens)])]) - 1
    assert torch.equal((split.tokens.to(torch.int64) == dataset.end_of_text).nonzero().flatten(), ends)
    assert split.document_bytes.tolist() == [len(text.encode()) for text in split.text()]
    assert split.bytes == sum(len(text.encode()) for text in split.text())


@pytest.mark.parametrize("name", SPLITS)
def test_levels_ascend_from_0_and_refine_one_another(dataset: Dataset, name: str) -> None:
    split = getattr(dataset, name)
    for unit in UNITS:
        starts = getattr(split, unit)
        assert starts.dtype == torch.int64
        assert starts[0] == 0
        assert bool((starts[1:] > starts[:-1]).all())
    assert set(split.documents.tolist()) < set(split.paragraphs.tolist()) < set(split.sentences.tolist())


def test_token_boundaries_are_those_of_the_text(dataset: Dataset) -> None:
    split = dataset.train
    paragraphs = [part for text in split.text() for part in text.split("\n\n")]
    assert [part.removesuffix("\n\n") for part in decoded(dataset, split, split.paragraphs)] == paragraphs
    sentences = []
    for text in split.text():
        starts = sentence_starts(text)
        sentences += [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    assert decoded(dataset, split, split.sentences) == sentences


def test_a_span_never_begins_inside_a_character() -> None:
    # 5 characters; the fourth is spread over two tokens, the first of which also ends the third.
    offsets = np.array([(0, 1), (1, 2), (2, 4), (3, 4), (4, 5)])
    assert token_starts(offsets, [0, 1, 3]).tolist() == [0, 1, 4]
    assert token_starts(offsets, [0, 4, 4]).tolist() == [0, 4]


def test_characters_of_several_tokens_keep_their_boundaries() -> None:
    texts = ["世界。你好！\n\n再见。", "é"]
    tokenizer = train_tokenizer(["x"], 257)
    tensors = encode(tokenizer, texts)
    bytes_of_first = [len(part.encode()) for part in ("世界。", "你好！\n\n", "再见。")]
    first_document = len(texts[0].encode()) + 1
    assert tensors["sentences"].tolist() == [0, bytes_of_first[0], sum(bytes_of_first[:2]), first_document]
    assert tensors["paragraphs"].tolist() == [0, sum(bytes_of_first[:2]), first_document]
    assert tensors["documents"].tolist() == [0, first_document]


def test_the_token_type_follows_the_vocabulary(dataset: Dataset) -> None:
    class Large:
        def get_vocab_size(self) -> int:
            return 2**16 + 1

        def encode_batch(self, texts: list[str]) -> list[object]:
            return dataset.tokenizer.encode_batch(texts)

    assert dataset.train.tokens.dtype == torch.uint16
    assert encode(Large(), ["some text"])["tokens"].dtype == torch.int32  # type: ignore[arg-type]


@pytest.mark.skipif(not MAPS.exists(), reason="needs Linux's list of mapped files")
def test_tokens_are_mapped_from_the_file(dataset: Dataset, data_folder: Path) -> None:
    address = dataset.train.tokens.data_ptr()
    for line in MAPS.read_text().splitlines():
        first, last = (int(number, 16) for number in line.split()[0].split("-"))
        if first <= address < last:
            assert line.endswith(str(data_folder / "train.safetensors"))
            return
    pytest.fail("the tokens' address is in no mapping")


@pytest.mark.parametrize("name", ["train.safetensors", "test.txt", "tokenizer.json", "removed.jsonl"])
def test_a_truncated_file_is_named_with_both_sizes(copy: Path, name: str) -> None:
    data = (copy / name).read_bytes() + b"some more"
    (copy / name).write_bytes(data)
    with pytest.raises(
        ValueError, match=f"load: .*{name} is truncated or altered: expected .*, got {len(data)} bytes"
    ):
        load(copy)


@pytest.mark.parametrize("name", ["validation.safetensors", "train.txt", "tokenizer.json"])
def test_one_changed_byte_is_named_with_both_checksums(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(
        ValueError,
        match=f"{name} is altered: expected .* SHA-256 [0-9a-f]{{64}}, got .* [0-9a-f]{{64}}; make it",
    ):
        load(copy)


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "test.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.safetensors is in the manifest but missing"):
        load(copy)


def test_a_folder_without_a_manifest_says_what_writes_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="lmkern prepare"):
        load(tmp_path)


@pytest.mark.parametrize("text", ['{"format": "lmk', "[]", "{}"])
def test_a_damaged_manifest_is_refused(copy: Path, text: str) -> None:
    (copy / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is truncated or no lmkern manifest"):
        load(copy)


def test_another_version_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(manifest | {"version": 2}))
    with pytest.raises(ValueError, match="expected lmkern-data version 1; got lmkern-data version 2"):
        load(copy)


def test_another_shard_version_is_refused(copy: Path) -> None:
    path = copy / "train.safetensors"
    save_file(load_file(path), path, metadata={"format": "lmkern-shard version 2"})
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"][path.name] = checksum(path)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"train\.safetensors: expected .*version 1.*; got .*version 2"):
        load(copy)
