"""The verbs on pairs, end to end: a task that is learned, judged, and used."""

import io
import json
import random
from pathlib import Path

import pytest

from lmkern.cli.main import USAGE_ERROR, main

WORDS = ("red", "blue", "old", "new", "cat", "dog", "sun", "sky")
OPTIONS = (
    *("--model.layers", "1", "--model.width", "64", "--model.heads", "4", "--model.feed-forward", "128"),
    *("--model.dropout", "0.0", "--training.learning-rate", "2e-3", "--training.dtype", "float32"),
    *("--training.batch-tokens", "224", "--training.validate-every", "60000"),
    *("--training.validation-tokens", "1000", "--training.threads", "1"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data folder of pairs: some words, and the same words from the last to the first."""
    chance, folder = random.Random(0), tmp_path_factory.mktemp("pairs")
    argv = ["prepare", "--vocab-size", "290", "--out", str(folder / "data")]
    for name, count in (("validation", 60), ("test", 60), ("train", 6000)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                words = chance.choices(WORDS, k=chance.randint(1, 5))
                pair = {"source": " ".join(words), "target": " ".join(words[::-1])}
                file.write(json.dumps(pair) + "\n")
        argv += [f"--{name}", str(folder / f"{name}.jsonl")]
    assert main(argv) == 0
    return str(folder / "data")


def test_from_pairs_to_scores_targets_and_report(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sacrebleu")
    out = str(tmp_path / "run")
    assert main(["train", "--data", data, "--out", out, *OPTIONS, "--training.tokens", "100000"]) == 0
    assert "of their tokens padding" in capsys.readouterr().err

    assert main(["evaluate", out]) == 0
    shown = capsys.readouterr().out
    assert "BLEU" in shown and "chrF" in shown and "tok:13a" in shown
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["split"] == "test"
    assert evaluation["rows"][0]["score"] > 90
    assert len((tmp_path / "run" / "outputs.txt").read_text().splitlines()) == evaluation["pairs"]

    assert main(["translate", out, "--source", "cat dog old"]) == 0
    assert capsys.readouterr().out == "old dog cat\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("sun sky\n\nnew red blue\n"))
    assert main(["translate", out, "--beams", "1"]) == 0
    assert capsys.readouterr().out == "sky sun\n\nblue red new\n"

    assert main(["report", out]) == 0
    page = (tmp_path / "run" / "report.md").read_text()
    assert "A model of train.jsonl" in page
    assert "were padding" in page and "tok:13a" in page and "output: " in page

    assert main(["generate", out, "--prompt", "cat"]) == USAGE_ERROR
    assert "expected a GPT" in capsys.readouterr().err
    assert main(["train", "--data", data, "--out", out, "--resume"]) == 0


def test_a_decoder_learns_pairs_too(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "run")
    argv = ["train", "--data", data, "--out", out, "--architecture", "gpt", "--model.context", "32"]
    stage = ["--training.stages.0.context", "32"]
    assert main([*argv, *stage, *OPTIONS, "--training.tokens", "100000"]) == 0
    capsys.readouterr()
    assert main(["translate", out, "--source", "cat dog old", "--beams", "2"]) == 0
    target = capsys.readouterr().out.split()
    assert (target[0], target[-1]) == ("old", "cat") and len(target) < 6
    monkeypatch.setattr("sys.stdin", io.StringIO("sky red\n" + "cat " * 40 + "\ncat dog old\n"))
    assert main(["translate", out, "--beams", "2"]) == 0
    shown = capsys.readouterr()
    lines = shown.out.split("\n")
    assert lines[0] and not lines[1] and lines[2].split() == target
    assert "source 2 has" in shown.err and "context of 32 leaves no room" in shown.err


def test_what_does_not_fit_is_refused_in_words(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, config = str(tmp_path / "run"), tmp_path / "config.toml"
    assert main(["prepare", "--train", "a", "b", "c", "--out", out]) == USAGE_ERROR
    assert "got 3 paths" in capsys.readouterr().err
    for text, message in (
        ('[model]\narchitecture = "t6"\n', "model.architecture must be one of gpt, t5; got 't6'"),
        ('[model]\narchitecture = "t5"\n', "an encoder-decoder learns from pairs"),
        ("[model]\nvocab_size = 400\n", "holds pairs and the stages read documents"),
        (
            '[model]\narchitecture = "t5"\nend = 1\n[[training.stages]]\nunit = "pairs"\n',
            "model.end must be the data's end of text, 0; got 1: set model.end = 0",
        ),
    ):
        config.write_text(text)
        assert main(["train", "--data", data, "--out", out, "--config", str(config)]) == USAGE_ERROR
        assert message in capsys.readouterr().err
    argv = ["train", "--data", data, "--out", out, "--config", str(config), "--architecture", "gpt"]
    assert main(argv) == USAGE_ERROR
    assert "leave one out" in capsys.readouterr().err
    assert main(["demo", "--config", str(config), "--out", out]) == USAGE_ERROR
    assert "a demo trains a GPT on text" in capsys.readouterr().err
