"""The training loop on pairs: what counts, exact resume, the running mean."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lmkern.data import DataConfig, PairDataset, load, prepare
from lmkern.data.pair_batches import IGNORED
from lmkern.models import GPTConfig, T5Config
from lmkern.training import RunConfig, Stage, TrainingConfig, dump_config, load_config, train
from lmkern.training.trainer import Trainer

VOCABULARY = 300


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PairDataset:
    chance, folder = random.Random(0), tmp_path_factory.mktemp("pairs")
    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(300):
            words = ["".join(chance.choices("abcdef", k=3)) for _ in range(chance.randint(1, 6))]
            file.write(json.dumps({"source": " ".join(words), "target": " ".join(words[::-1])}) + "\n")
    prepare(DataConfig(train=(str(folder / "pairs.jsonl"),), vocab_size=VOCABULARY), folder / "data")
    dataset = load(folder / "data")
    assert isinstance(dataset, PairDataset)
    return dataset


def make_config(*, model: Any = None, **training: Any) -> RunConfig:
    t5 = T5Config(VOCABULARY, layers=1, heads=2, width=16, feed_forward=32, dropout=0.1, start=0, end=0)
    fields: dict[str, Any] = {
        "tokens": 12 * 256,
        "batch_tokens": 256,
        "stages": (Stage("pairs", 64),),
        "learning_rate": 1e-2,
        "dtype": "float32",
        "device": "cpu",
        "validate_every": 3 * 256,
        "validation_tokens": 1024,
        "checkpoint_every": 4 * 256,
        "threads": 1,
        "average": 0.9,
        "label_smoothing": 0.1,
    }
    return RunConfig(model=model or t5, training=TrainingConfig(**(fields | training)))


def gpt(dropout: float = 0.0) -> GPTConfig:
    return GPTConfig(VOCABULARY, context=128, layers=1, heads=2, width=16, dropout=dropout)


def trainer(config: RunConfig, dataset: PairDataset) -> Trainer:
    return Trainer(config, dataset, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("decoder", [False, True])
def test_the_loss_is_the_mean_over_the_targets_and_nothing_else(
    decoder: bool, label_smoothing: float, pairs: PairDataset
) -> None:
    model = gpt() if decoder else replace(make_config().model, dropout=0.0)
    run = trainer(make_config(model=model, label_smoothing=label_smoothing, micro_batch_tokens=64), pairs)
    batches = (run.batches[0](step) for step in range(99))
    step, (source, targets, mask) = next(
        (step, batch) for step, batch in enumerate(batches) if (batch[1][:, -1] == IGNORED).any()
    )
    with torch.no_grad():
        if decoder:
            logits = run.model(source)
        else:
            before = torch.cat([torch.zeros_like(targets[:, :1]), targets[:, :-1].clamp(min=0)], dim=1)
            logits = run.model(source, before, mask)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, label_smoothing=label_smoothing
    )
    assert run.step(step).loss == pytest.approx(expected.item(), abs=1e-5)


def test_validation_reads_every_pair_without_smoothing(pairs: PairDataset) -> None:
    run = trainer(make_config(validation_tokens=1_000_000, label_smoothing=0.3), pairs)
    counted = sum(batch.counted for batch in run.validation_batches)
    assert counted == len(pairs.validation.target) + len(pairs.validation)
    loss, bits_per_byte = run.validate()
    plain = trainer(make_config(validation_tokens=1_000_000, label_smoothing=0.0), pairs)
    assert plain.validate()[0] == loss
    n_bytes = sum(len(target.encode()) for _, target in pairs.validation.text())
    assert bits_per_byte == pytest.approx(loss * counted / math.log(2) / n_bytes)


def test_resumed_training_is_the_uninterrupted_one_bit_for_bit(
    pairs: PairDataset, tmp_path: Path, read_run: Callable[[Path], Any], assert_same_run: Callable[..., None]
) -> None:
    config = make_config()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, pairs, whole, progress=False)
    train(config, pairs, parts, progress=False)
    # As after a kill: the newest checkpoint that is left is that of step 8.
    for path in (parts / "checkpoints").iterdir():
        if path.name != "step-00000008":
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    train(config, pairs, parts, resume=True, progress=False)
    assert_same_run(read_run(whole), read_run(parts))
    stage = next(event for event in read_run(whole)["events"] if event["event"] == "stage")
    assert stage["unit"] == "pairs" and 0 < stage["padding"] < 0.2 and stage["left_out"] == 0


def test_another_number_of_threads_may_go_on(pairs: PairDataset, tmp_path: Path) -> None:
    config = make_config(average=0.0)
    train(config, pairs, tmp_path, progress=False)
    more = replace(config, training=replace(config.training, threads=2))
    assert train(more, pairs, tmp_path, resume=True, progress=False)["reason"] == "tokens"


def test_the_running_mean_is_validated_and_kept_in_place_of_the_weights(pairs: PairDataset) -> None:
    run = trainer(make_config(average=0.75), pairs)
    name, weight = next(iter(run.model.named_parameters()))
    history = []
    for step in range(6):
        run.step(step)
        history.append(weight.detach().clone())
    expected = history[0]
    for step, value in enumerate(history[1:], 1):
        expected = expected + max(0.25, 1 / (step + 1)) * (value - expected)
    assert torch.allclose(run.average[name], expected, atol=1e-6)
    run.validate()
    assert torch.equal(weight, history[-1])
    assert torch.equal(run.best[name], run.average[name])
    assert not trainer(make_config(average=0.0), pairs).average


def test_tables_move_at_their_own_rate(pairs: PairDataset) -> None:
    run = trainer(make_config(embedding_rate=5.0, warmup=0.0, weight_decay=0.0), pairs)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    rate = run.step(0).learning_rate
    moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in run.model.named_parameters()}
    # Adam's first step moves each weight with a gradient by the learning rate.
    for table in ("embedding.weight", "encoder_bias", "decoder_bias"):
        assert moved.pop(table) == pytest.approx(5 * rate, rel=1e-2)
    assert max(moved.values()) == pytest.approx(rate, rel=1e-2)


@pytest.mark.parametrize("model", [None, gpt()])
def test_a_configuration_file_says_which_architecture(model: Any, tmp_path: Path) -> None:
    config = make_config(model=model)
    (tmp_path / "config.toml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.toml") == config
    assert f'architecture = "{"gpt" if model else "t5"}"' in dump_config(config)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"stages": (Stage("pairs", 8, 0.5), Stage("documents", 8, 0.5))}, "either all stages"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
        ({"average": 1.0}, r"average must be in \[0, 1\)"),
        ({"embedding_rate": -1.0}, "embedding_rate must be 0 or more"),
        ({"stages": (Stage("documents", 64),)}, "an encoder-decoder learns from pairs"),
    ],
)
def test_settings_that_make_no_sense_are_refused(training: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**training)
