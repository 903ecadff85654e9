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
    *("--model.dropout", "0.0", "--training.learning-rate", "5e-3", "--training.dtype", "float32"),
    *("--training.batch-tokens", "512", "--training.tokens", "150000", "--training.validate-every", "50000"),
    *("--training.threads", "2"),
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """1,500 pairs: some words, and the same words from the last to the first."""
    chance = random.Random(0)
    path = tmp_path_factory.mktemp("pairs") / "reversed.jsonl"
    with path.open("w") as file:
        for _ in range(1500):
            words = chance.choices(WORDS, k=chance.randint(1, 5))
            file.write(json.dumps({"source": " ".join(words), "target": " ".join(words[::-1])}) + "\n")
    return str(path)


def test_from_pairs_to_scores_targets_and_report(
    pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sacrebleu")
    data, out = str(tmp_path / "data"), str(tmp_path / "run")
    assert main(["prepare", "--train", pairs, "--vocab-size", "290", "--out", data]) == 0
    assert "vocabulary 2" in capsys.readouterr().out
    assert main(["train", "--data", data, "--out", out, *OPTIONS]) == 0
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
    assert "A model of reversed.jsonl" in page
    assert "were padding" in page and "tok:13a" in page and "output: " in page

    assert main(["generate", out, "--prompt", "cat"]) == USAGE_ERROR
    assert "expected a GPT" in capsys.readouterr().err
    assert main(["train", "--data", data, "--out", out, "--resume"]) == 0


def test_a_decoder_learns_pairs_too(pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = str(tmp_path / "data"), str(tmp_path / "run")
    assert main(["prepare", "--train", pairs, "--vocab-size", "290", "--out", data]) == 0
    argv = ["train", "--data", data, "--out", out, "--architecture", "gpt", "--model.context", "32"]
    stage = ["--training.stages.0.context", "32"]
    assert main([*argv, *stage, *OPTIONS, "--training.tokens", "100000"]) == 0
    capsys.readouterr()
    assert main(["translate", out, "--source", "cat dog old", "--beams", "2"]) == 0
    assert sorted(capsys.readouterr().out.split()) == ["cat", "dog", "old"]


def test_what_does_not_fit_is_refused_in_words(
    pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out, config = str(tmp_path / "data"), str(tmp_path / "run"), tmp_path / "config.toml"
    assert main(["prepare", "--train", pairs, pairs, pairs, "--out", data]) == USAGE_ERROR
    assert "got 3 paths" in capsys.readouterr().err
    assert main(["prepare", "--train", pairs, "--vocab-size", "290", "--out", data]) == 0
    capsys.readouterr()
    for text, message in (
        ('[model]\narchitecture = "t6"\n', "model.architecture must be one of gpt, t5; got 't6'"),
        ('[model]\narchitecture = "t5"\n', "an encoder-decoder learns from pairs"),
        ("[model]\nvocab_size = 400\n", "holds pairs and the stages read documents"),
        (
            '[model]\narchitecture = "t5"\n[[training.stages]]\nunit = "pairs"\n',
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
