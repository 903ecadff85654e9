"""Where an option's value comes from."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from lmkern.cli.demo import command as demo_command
from lmkern.cli.options import config_defaults, parse, peek
from lmkern.cli.prepare import command as prepare_command
from lmkern.jobs.demo import preset

CONFIG = """
[data]
vocab_size = 300
[model]
context = 128
layers = 3
[training]
tokens = 12345
batch_tokens = 256
[[training.stages]]
unit = "sentences"
context = 64
share = 0.5
[[training.stages]]
context = 128
share = 0.5
"""


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A verb for the test."""

    out: Path
    number: int = 1
    flag: bool = False


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    return str(path)


def test_command_line_wins_over_defaults() -> None:
    assert parse(Verb, "verb", ["--out", "x"], {"number": 5}) == Verb(out=Path("x"), number=5)
    argv = ["--out", "x", "--number", "7", "--flag"]
    assert parse(Verb, "verb", argv, {"number": 5}) == Verb(out=Path("x"), number=7, flag=True)


def test_required_option_stays_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Verb, "verb", [], {"number": 5})
    assert stop.value.code == 2
    assert "--out" in capsys.readouterr().err


def test_peek_reads_only_what_it_names() -> None:
    options = peek(
        ["a", "--minutes=20", "--other", "3", "--resume", "--help"], minutes=float, resume=False, out=Path
    )
    assert vars(options) == {"minutes": 20.0, "resume": True, "out": None}


@pytest.mark.parametrize("argv", [["--minutes", "many"], ["--minutes"]])
def test_peek_leaves_complaints_to_the_parser(argv: list[str]) -> None:
    assert peek(argv, minutes=float).minutes is None


def test_no_file_gives_no_defaults() -> None:
    assert config_defaults(None) == {}


def test_file_gives_defaults_and_the_command_line_wins(config: str) -> None:
    demo = demo_command(["--config", config, "--model.layers", "9", "--training.stages.1.unit", "paragraphs"])
    assert (demo.vocab_size, demo.tokens, demo.model.context, demo.model.layers) == (300, 12345, 128, 9)
    assert [stage.unit for stage in demo.training.stages] == ["sentences", "paragraphs"]
    assert demo_command([f"--config={config}", "--tokens", "5"]).tokens == 5
    assert prepare_command(["--config", config, "--out", "x"]).vocab_size == 300


def test_unknown_field_in_the_file_gets_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[model]\nlayrs = 3\n")
    with pytest.raises(ValueError, match=r"model\.layrs: did you mean model\.layers"):
        demo_command(["--config", str(tmp_path / "c.toml")])


def test_minutes_choose_the_model() -> None:
    assert demo_command(["--minutes", "20"]).model == preset(20).model
    assert demo_command([]).model == preset(3).model


def test_either_spelling_of_the_budget_is_heard() -> None:
    assert demo_command(["--training.tokens", "777"]).tokens == 777


def test_positional_paths_and_data_fields_reach_the_data(tmp_path: Path) -> None:
    found = prepare_command(["a.txt", "b", "--out", "x", "--max-document-bytes", "512"])
    assert (found.paths, found.max_document_bytes, found.overwrite) == (("a.txt", "b"), 512, False)
