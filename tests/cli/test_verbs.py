"""Every verb on a small text: from the words to the page, in seconds."""

import json
import random
from pathlib import Path

import pytest

from lmkern.cli.main import INTERRUPTED, USAGE_ERROR, main

CONFIG = """
[data]
vocab_size = 300
max_document_bytes = 512
[model]
vocab_size = 300
context = 32
layers = 1
heads = 2
width = 16
[training]
tokens = 768
batch_tokens = 128
dtype = "float32"
threads = 1
validation_tokens = 512
[[training.stages]]
unit = "sentences"
context = 16
share = 0.5
[[training.stages]]
context = 32
share = 0.5
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with poem.txt, 40 kB in short paragraphs, and config.toml."""
    folder = tmp_path_factory.mktemp("place")
    chance = random.Random(0)
    words = [
        "river",
        "stone",
        "light",
        "and",
        "under",
        "the",
        "slow",
        "bright",
        "wind",
        "keeps",
        "its",
        "word",
    ]
    paragraphs = [
        " ".join(chance.choices(words, k=chance.randint(8, 30))).capitalize() + f" {number}."
        for number in range(400)
    ]
    (folder / "poem.txt").write_text("\n\n".join(paragraphs))
    (folder / "config.toml").write_text(CONFIG)
    return folder


def test_demo_goes_from_text_to_report(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert (
        main(["demo", str(place / "poem.txt"), "--config", str(place / "config.toml"), "--out", str(out)])
        == 0
    )
    shown = capsys.readouterr().out
    assert "1/5  Prepare" in shown
    assert "2/5  Train: 768 tokens, GPT of 1 layers" in shown
    assert "modified Kneser-Ney 5-gram" in shown
    assert shown.endswith(f"report: {out / 'report.html'}\n")
    page = (out / "report.md").read_text()
    assert "6 steps, 768 tokens, the whole budget" in page
    samples = json.loads((out / "samples.json").read_text())
    assert samples[-1]["prompt"] == ""
    assert all(len(sample["prompt"].split()) == 8 for sample in samples[:-1])
    assert set(json.loads((out / "timings.json").read_text())) == {"prepare", "train", "evaluate", "generate"}


def test_verbs_one_by_one_agree_with_each_other(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out, config = (
        str(tmp_path / "data"),
        str(tmp_path / "run"),
        ["--config", str(place / "config.toml")],
    )
    assert main(["prepare", str(place / "poem.txt"), "--out", data, *config]) == 0
    shown = capsys.readouterr().out
    assert "vocabulary 300" in shown
    assert shown.endswith(f"data in {data}\n")

    assert main(["train", "--data", data, "--out", out, *config]) == 0
    assert main(["train", "--data", data, "--out", out, *config]) == USAGE_ERROR
    assert "already holds a run" in capsys.readouterr().err
    assert main(["train", "--data", data, "--out", out, "--resume"]) == 0
    assert main(["train", "--data", data, "--out", out, "--resume", "--model.layers", "2"]) == USAGE_ERROR
    assert "model.layers was 1 and is now 2" in capsys.readouterr().err

    assert main(["report", out]) == 0
    assert "has not been evaluated yet" in (tmp_path / "run" / "report.md").read_text()

    assert main(["evaluate", out]) == 0
    assert "xz -9e given the training text" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["split"] == "test"

    # The run alone is enough to generate from: it moves without its data.
    out = str((tmp_path / "run").rename(tmp_path / "moved"))
    (tmp_path / "data").rename(tmp_path / "gone")
    written = []
    for _ in range(2):
        assert main(["generate", out, "--prompt", "The wind", "--max-new-tokens", "12", "--seed", "3"]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1]
    assert written[0].startswith("The wind")
    assert len(written[0]) > len("The wind\n")

    for dtype in ("bfloat16", "float16"):
        assert main(["generate", out, "--max-new-tokens", "5", "--dtype", dtype]) == 0
    capsys.readouterr()
    assert main(["generate", out, "--temperature", "-1"]) == USAGE_ERROR
    assert "temperature" in capsys.readouterr().err


def test_skipped_files_are_counted_and_the_first_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    binaries = [tmp_path / f"{name}.bin" for name in "abcde"]
    for path in binaries:
        path.write_bytes(bytes(9))
    argv = ["prepare", str(place / "poem.txt"), *map(str, binaries), "--out", str(tmp_path / "data")]
    assert main([*argv, "--config", str(place / "config.toml")]) == 0
    shown = capsys.readouterr().out.splitlines()[-1]
    assert shown == f"     skipped, not text: {', '.join(map(str, binaries[:3]))} and 2 more"


def test_files_in_other_encodings_are_named_by_what_they_were_read_as(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "Die Straße führt über die Brücke zum Fluß. "
    named = []
    for encoding, count in (("latin-1", 4), ("utf-16", 1), ("utf-8-sig", 1)):
        for number in range(count):
            named.append(tmp_path / f"{encoding}-{number}.txt")
            named[-1].write_text(f"{text}{number} {encoding}", encoding=encoding)
    argv = ["prepare", str(place / "poem.txt"), *map(str, named), "--out", str(tmp_path / "data")]
    assert main([*argv, "--config", str(place / "config.toml")]) == 0
    shown = capsys.readouterr().out.splitlines()[-1]
    latin = ", ".join(map(str, named[:3]))
    assert shown == f"     read as latin-1: {latin} and 1 more; utf-16: {named[4]}"
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["corpus"]["encodings"] == {
        "latin-1": [str(path) for path in named[:4]],
        "utf-16": [str(named[4])],
    }


def test_vocabulary_of_the_model_is_that_of_the_data(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lmkern.cli.train import command

    data = str(tmp_path / "data")
    config = str(place / "config.toml")
    assert main(["prepare", str(place / "poem.txt"), "--out", data, "--config", config]) == 0
    assert command(["--data", data, "--out", "x"]).model.vocab_size == 300
    assert command(["--data", data, "--out", "x", "--model.vocab-size", "512"]).model.vocab_size == 512
    for text, size in (("[model]\nlayers = 1", 300), ("", 300), ("[model]\nvocab_size = 320", 320)):
        (tmp_path / "some.toml").write_text(text)
        options = ["--data", data, "--out", "x", "--config", str(tmp_path / "some.toml")]
        assert command(options).model.vocab_size == size


def test_interrupted_demo_says_how_to_go_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import lmkern.jobs.demo as module

    interrupted = {"reason": "interrupted", "seconds": 1.0}
    monkeypatch.setattr(module, "train", lambda *arguments, **options: interrupted)
    out = tmp_path / "run"
    argv = ["demo", str(place / "poem.txt"), "--config", str(place / "config.toml"), "--out", str(out)]
    assert main(argv) == INTERRUPTED
    assert f"to go on: lmkern train --data {out / 'data'} --out {out} --resume" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["evaluate", "generate"])
def test_run_without_a_model_says_how_to_get_one(
    verb: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(tmp_path / "data")
    config = ["--config", str(place / "config.toml")]
    assert main(["prepare", str(place / "poem.txt"), "--out", data, *config]) == 0
    about = {"format": "lmkern-run", "version": 1, "data": data}
    (tmp_path / "run.json").write_text(json.dumps(about))
    assert main([verb, str(tmp_path)]) == USAGE_ERROR
    assert "holds no model yet; finish the training first" in capsys.readouterr().err


def test_missing_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")]) == USAGE_ERROR
    shown = capsys.readouterr().err
    assert shown.startswith("lmkern: error: ")
    assert "nowhere" in shown
    assert shown.count("\n") == 1
