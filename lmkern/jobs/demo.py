"""The main job in one go: text, corpus, training, evaluation, samples, report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import lmkern.data
from lmkern.data import DataConfig, Dataset, prepare
from lmkern.data.shards import REMOVED
from lmkern.jobs.steps import evaluate_run, sample_run
from lmkern.jobs.timings import record_time
from lmkern.models import GPTConfig
from lmkern.report.markdown import count, duration, size
from lmkern.report.run import Run, encodings, read_removed, read_run
from lmkern.report.write import write_report
from lmkern.training import RunConfig, Stage, TrainingConfig, tokens_for_minutes, train
from lmkern.training.progress import ProgressLine
from lmkern.training.run_folder import DATA

Say = Callable[[str], None]

# Seconds after training that no corpus or model changes much: loading, four samples, the report's picture.
FIXED_SECONDS = 12.0
# A megabyte of training text: counting its n-grams, and xz -9e of the test text, the training text and both.
SECONDS_PER_MEGABYTE = 5.0
# Scoring a token costs a forward pass, a third of a training step; half-overlapping windows read long
# documents twice; evaluation computes in float32, up to twice as slow as what training used.
SCORING_COST = 2 * 2 / 3


@dataclass(frozen=True)
class Preset:
    """What fits a time: the model and how it is trained. Fields as in GPTConfig and TrainingConfig."""

    layers: int
    width: int
    heads: int
    context: int
    dropout: float
    batch_tokens: int
    learning_rate: float
    validate_every: int

    def config(self) -> RunConfig:
        """The whole configuration. Short rows first: they are cheap, and enough for what is learnt early."""
        model = GPTConfig(
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            context=self.context,
            dropout=self.dropout,
        )
        stages = (
            Stage("sentences", self.context // 4, 0.05),
            Stage("paragraphs", self.context // 2, 0.15),
            Stage("documents", self.context, 0.8),
        )
        training = TrainingConfig(
            batch_tokens=self.batch_tokens,
            learning_rate=self.learning_rate,
            stages=stages,
            validate_every=self.validate_every,
            validation_tokens=16_384,
        )
        return RunConfig(DataConfig(), model, training)


# Minutes from which on each serves. Three minutes read the embedded corpus three times, twenty minutes a
# dozen times: only the longer run needs dropout.
PRESETS = {
    0: Preset(
        layers=4,
        width=256,
        heads=4,
        context=256,
        dropout=0.0,
        batch_tokens=4096,
        learning_rate=3e-3,
        validate_every=100_000,
    ),
    10: Preset(
        layers=6,
        width=384,
        heads=6,
        context=256,
        dropout=0.1,
        batch_tokens=4096,
        learning_rate=2e-3,
        validate_every=250_000,
    ),
}


def preset(minutes: float) -> RunConfig:
    """The configuration to make the most of so many minutes on two cores. ValueError unless minutes > 0."""
    if not minutes > 0:
        raise ValueError(f"demo: minutes must be above 0; got {minutes}")
    return PRESETS[max(least for least in PRESETS if least <= minutes)].config()


def demo(
    config: RunConfig,
    folder: Path,
    *,
    minutes: float,
    tokens: int = 0,
    say: Say = print,
    progress: bool = True,
) -> Run | None:
    """Prepare, train, evaluate, write samples and report, all into a new folder.

    config: model.vocab_size becomes the tokenizer's unless it is set; training.tokens is not read.
    tokens: the budget of the training; 0: as many as leave the whole in `minutes` (measured on this machine).
    say: given a headline before each step and its result after. progress: show a live line on stderr.

    Returns the run, or None where training was interrupted. Raises FileExistsError unless the folder is new
    or empty, ValueError where the data cannot be used or the minutes are too few.
    """
    start = time.perf_counter()
    if not isinstance(config.model, GPTConfig) or config.data.train:
        raise ValueError(
            "demo: a demo trains a GPT on text; pairs go through `lmkern prepare`, `train` and `evaluate`"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"demo: {folder} is not empty and a demo trains in a new folder: "
            "choose another --out, or leave it out"
        )
    source = ", ".join(config.data.paths) or "the documentation inside this Python"
    say(f"1/5  Prepare: clean, split and tokenize {source}")
    with ProgressLine(progress) as line:
        manifest = prepare(config.data, folder / DATA, progress=line.count)
    say(describe_data(manifest, folder / DATA))
    dataset = cast(Dataset, lmkern.data.load(folder / DATA))
    if config.model.vocab_size == GPTConfig.vocab_size:
        config = replace(config, model=replace(config.model, vocab_size=manifest["vocab_size"]))
    record_time(folder, "prepare", time.perf_counter() - start)

    if not tokens:
        say("2/5  Train: measuring how many tokens fit")
        before = time.perf_counter()
        tokens = token_budget(config, dataset, seconds=minutes * 60 - (before - start))
        record_time(folder, "measure the machine", time.perf_counter() - before)
    steps = max(1, tokens // config.training.batch_tokens)
    config = replace(config, training=replace(config.training, tokens=steps * config.training.batch_tokens))
    say(
        f"2/5  Train: {count(config.training.tokens)} tokens, {describe_model(cast(GPTConfig, config.model))}"
    )
    trained = train(config, dataset, folder, progress=progress)
    record_time(folder, "train", trained["seconds"])
    if trained["reason"] == "interrupted":
        return None

    say("3/5  Evaluate: the test text, beside a 5-gram model and xz")
    with ProgressLine(progress) as line:
        evaluate_run(folder, progress=line.count)
    say("4/5  Generate: samples")
    sample_run(folder)
    say("5/5  Report")
    write_report(folder)
    return read_run(folder)


def token_budget(config: RunConfig, dataset: Dataset, seconds: float) -> int:
    """The tokens with which training and all that follows it take so many seconds here.

    Raises ValueError where the time does not even hold what follows the training.
    """
    before = time.perf_counter()
    # In less than a minute whole steps and one validation would blur the speed.
    measured = max(seconds, 60)
    rate = tokens_for_minutes(config, dataset, measured / 60) / measured
    left = seconds - (time.perf_counter() - before) - reserve(dataset, rate)
    if left <= 0:
        raise ValueError(
            f"demo: what follows the training takes about {duration(reserve(dataset, rate))} on this text "
            "and machine, more than is left: give more --minutes, or the training's budget as --tokens"
        )
    return int(left * rate)


def reserve(dataset: Dataset, tokens_per_second: float) -> float:
    """Seconds to keep for evaluation, samples and report; tokens_per_second is the speed of training.

    Rather too many than too few: the sum of what is fixed, what grows with the training text (n-grams, xz)
    and what grows with the text to score (validation, for the weight of the interpolation, and test).
    """
    scored = len(dataset.validation.tokens) + len(dataset.test.tokens)
    text = SECONDS_PER_MEGABYTE * dataset.train.bytes / 1e6
    return FIXED_SECONDS + text + SCORING_COST * scored / tokens_per_second


def describe_data(manifest: dict[str, Any], folder: Path) -> str:
    """What the preparation found and skipped, in two or three lines. folder: the data folder."""
    splits = manifest["splits"]
    pairs = "pairs" in splits["train"]
    held = ", ".join(
        f"{name} {count(split['pairs'])} pairs" if pairs else f"{name} {size(split['bytes'])}"
        for name, split in splits.items()
    )
    sides = ("source_tokens", "target_tokens") if pairs else ("tokens",)
    tokens = sum(splits["train"][side] for side in sides)
    words = (
        f"     {manifest['corpus']['name']}: {size(manifest['corpus']['bytes'])}; {held}\n"
        f"     vocabulary {count(manifest['vocab_size'])}, "
        f"{count(tokens)} training tokens; data in {folder}"
    )
    if others := encodings(manifest):
        words += f"\n     read as {others}"
    if skipped := read_removed(folder / REMOVED).get("not text"):
        words += f"\n     skipped, not text: {skipped.names()}"
    return words


def describe_model(config: GPTConfig) -> str:
    """The model's size in a few words."""
    return (
        f"GPT of {config.layers} layers, width {config.width}, {config.heads} heads, context {config.context}"
    )
