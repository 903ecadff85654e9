import dataclasses
from pathlib import Path
from typing import Any

import pytest

from lmkern.data import DataConfig
from lmkern.data.tokenizer import END_OF_TEXT_ID
from lmkern.models import GPTConfig, T5Config
from lmkern.training import RunConfig, Stage, TrainingConfig, dump_config, load_config
from lmkern.training.config import config_differences


def write(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_field_survives_writing_and_reading(tmp_path: Path) -> None:
    stages = (Stage("sentences", 64, 0.3), Stage("paragraphs", 128, 0.7))
    config = RunConfig(
        data=DataConfig(paths=("a b/ü.txt", 'quo"te\\back\n\x7f'), vocab_size=300),
        model=GPTConfig(vocab_size=300, context=128, width=96, heads=6, bias=True, positions="learned"),
        training=TrainingConfig(stages=stages, learning_rate=1e-5, clip=0.1 + 0.2, seed=2**62),
    )
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_fields_that_are_not_named_keep_their_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "[training]\nlearning_rate = 1\n"))
    expected = dataclasses.replace(RunConfig(), training=TrainingConfig(learning_rate=1.0))
    assert config == expected
    assert type(config.training.learning_rate) is float


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "\ufeff[training]\nseed = 3\n")).training.seed == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[training]\nlerning_rate = 1.0",
            r"unknown field training\.lerning_rate: did you mean training\.learning_rate",
        ),
        ("[modle]\nwidth = 1", r"unknown field modle: did you mean model"),
        (
            "[[training.stages]]\nlength = 3",
            r"unknown field training\.stages\[0\]\.length: there are unit, context",
        ),
        ("[training]\ntokens = 1.5", r"training\.tokens must be int; got 1\.5"),
        ("[training]\nthreads = true", r"training\.threads must be int; got True"),
        (
            "[training]\ndtype = 'float8'",
            r"training\.dtype must be one of auto, bfloat16, float32; got 'float8'",
        ),
        ("[data]\npaths = 'a'", r"data\.paths must be a list of str; got 'a'"),
        ("[training]\nstages = 2", r"training\.stages must be a list of tables; got 2"),
        ("model = 3", r"model must be a table; got 3"),
        ("architecture = 't5'", r"unknown field architecture: did you mean model\.architecture\?"),
        ("[training]\nlayers = 2", r"unknown field training\.layers: did you mean model\.layers\?"),
        ("[model]\nwidth = 385", r"GPTConfig: width must be a multiple of heads"),
        ("[training]\nbatch_tokens = 1000", r"multiple of each stage's context; got 1000 and 256: take 1024"),
        ("[training", r"config\.toml: "),
    ],
)
def test_what_cannot_be_read_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as error:
        load_config(path)
    assert str(path) in str(error.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.toml"):
        load_config(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1; got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\)"),
        ({"warmup": 1.5}, r"warmup must be in \[0, 1\]"),
        ({"stages": ()}, "at least one stage"),
        ({"stages": (Stage(share=0.5),)}, "add up to 1; got 0.5"),
        ({"micro_batch_tokens": 100}, "hold a row of each stage; got 100 and a context of 256"),
    ],
)
def test_value_out_of_range_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"TrainingConfig: .*{message}"):
        TrainingConfig(**fields)


def test_stage_of_unknown_unit_is_refused() -> None:
    with pytest.raises(
        ValueError, match="unit must be one of sentences, paragraphs, documents, pairs; got 'words'"
    ):
        Stage("words")  # type: ignore[arg-type]


def test_stage_longer_than_the_model_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"a stage has a context of 256 and the model takes 128: .*training\.stages\.0\.context",
    ):
        RunConfig(model=GPTConfig(context=128))


def test_differences_are_listed_by_dotted_name() -> None:
    other = RunConfig(data=DataConfig(paths=("x",)), training=TrainingConfig(seed=1))
    assert config_differences(RunConfig(), other) == {"data.paths": ((), ("x",)), "training.seed": (0, 1)}


def test_an_encoder_decoder_begins_and_ends_with_the_tokenizers_end_of_text() -> None:
    assert T5Config().start == T5Config().end == END_OF_TEXT_ID
