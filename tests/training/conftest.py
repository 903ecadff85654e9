"""A small corpus, prepared once, and a configuration small enough for a step in milliseconds."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lmkern.data import DataConfig, Dataset, load, prepare
from lmkern.models import GPTConfig
from lmkern.training import RunConfig, Stage, TrainingConfig

VOCABULARY = 300


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghij", k=chance.randint(2, 7))) for _ in range(200)]

    def sentence() -> str:
        return " ".join(chance.choices(words, k=chance.randint(4, 12))).capitalize() + "."

    def paragraph() -> str:
        return " ".join(sentence() for _ in range(chance.randint(2, 5)))

    source = tmp_path_factory.mktemp("text")
    for i in range(100):
        text = "\n\n".join(paragraph() for _ in range(3))
        (source / f"{i}.txt").write_text(text, encoding="utf-8")
    folder = tmp_path_factory.mktemp("data") / "data"
    prepare(DataConfig(paths=(str(source),), vocab_size=VOCABULARY), folder)
    return load(folder)


@pytest.fixture(autouse=True)
def known_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time is spent on measuring the machine."""
    monkeypatch.setattr("lmkern.training.loop.measure_ceiling", lambda device, dtype: 1e12)


@pytest.fixture
def make_config() -> Callable[..., RunConfig]:
    """A run of 12 steps: dropout, accumulation, two stages, validations and checkpoints out of step."""

    def make(*, model: dict[str, Any] | None = None, **training: Any) -> RunConfig:
        fields: dict[str, Any] = {
            "tokens": 12 * 128,
            "batch_tokens": 128,
            "micro_batch_tokens": 48,
            "stages": (Stage("sentences", 16, 0.5), Stage("documents", 32, 0.5)),
            "learning_rate": 1e-2,
            "dtype": "float32",
            "device": "cpu",
            "validate_every": 3 * 128,
            "validation_tokens": 256,
            "checkpoint_every": 4 * 128,
            "threads": 1,
        }
        sizes = {
            "vocab_size": VOCABULARY,
            "context": 32,
            "layers": 2,
            "heads": 2,
            "width": 32,
            "dropout": 0.1,
        }
        return RunConfig(
            model=GPTConfig(**(sizes | (model or {}))), training=TrainingConfig(**(fields | training))
        )

    return make


@pytest.fixture
def read_run() -> Callable[[Path], dict[str, Any]]:
    """What a run computed: last checkpoint, final model, and events without what was measured."""
    measured = ("tokens_per_second", "ceiling_share", "seconds", "elapsed", "ceiling_flops")

    def read(folder: Path) -> dict[str, Any]:
        last = sorted((folder / "checkpoints").iterdir())[-1]
        events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return {
            "tensors": {path.name: load_file(path) for path in sorted(last.glob("*.safetensors"))},
            "model": load_file(folder / "model" / "model.safetensors"),
            "state": json.loads((last / "state.json").read_text())["training"],
            "events": [
                {name: value for name, value in event.items() if name not in measured}
                for event in events
                if event["event"] in ("stage", "step", "validation", "end")
            ],
        }

    return read


@pytest.fixture
def assert_same_run() -> Callable[[Any, Any], None]:
    """Equality to the last bit, with the place of the first difference."""

    def check(a: Any, b: Any, place: str = "run") -> None:
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype, place
            assert torch.equal(a, b), place
        elif isinstance(a, dict):
            assert a.keys() == b.keys(), place
            for key in a:
                check(a[key], b[key], f"{place}[{key!r}]")
        else:
            assert a == b, place

    return check
