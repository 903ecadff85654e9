"""A run folder made by hand, with hostile text in every place that a user or a model can fill."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

HOSTILE = (
    "<script>alert(1)</script> **bold** [link](http://x.example) | cell ```fence``` &amp; `tick` # no heading"
)

CONFIG = """
[data]
paths = ["poems.txt"]
vocab_size = 512

[model]
vocab_size = 512
context = 64
layers = 2
positions = "rotary"

[training]
tokens = 102400
batch_tokens = 1024
learning_rate = 0.002

[[training.stages]]
unit = "sentences"
context = 32
share = 0.25

[[training.stages]]
unit = "documents"
context = 64
share = 0.75
"""


def write_json(path: Path, value: Any) -> None:
    """One JSON file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_data(folder: Path) -> None:
    """The parts of a data folder that a report reads."""
    manifest = {
        "format": "lmkern-data",
        "version": 1,
        "python": "3.11.7",
        "corpus": {
            "name": "poems <i>of</i> | all *kinds*",
            "sources": ["po`ems|2.txt"],
            "files": 3,
            "bytes": 2_345_678,
            "sha256": "ab" * 32,
            "encodings": {"latin-1": ["a|b.txt"]},
        },
        "counts": {"read": 12, "exact_duplicates": 2, "not text": 1},
        "splits": {
            "train": {"documents": 80, "bytes": 1_800_000, "tokens": 450_000},
            "validation": {"documents": 10, "bytes": 200_000, "tokens": 50_000},
            "test": {"documents": 10, "bytes": 240_000, "tokens": 60_000},
        },
        "vocab_size": 512,
    }
    write_json(folder / "manifest.json", manifest)
    removed = [
        {"source": "a", "reason": "exact duplicate", "text": "häh"},
        {"source": "b", "reason": "exact duplicate", "text": "x"},
        {"source": "c.bin|`", "reason": "not text", "bytes": 4096},
    ]
    lines = "\n".join(json.dumps(entry) for entry in removed)
    (folder / "removed.jsonl").write_text(lines + "\n", encoding="utf-8")


def metric_lines() -> list[dict[str, Any]]:
    """A hundred steps in two stages, a validation every ten, and the end."""
    events: list[dict[str, Any]] = []
    for step in range(1, 101):
        loss = 3 + 4 * math.exp(-step / 20) + 0.1 * math.sin(step)
        events.append(
            {
                "event": "step",
                "step": step,
                "tokens": step * 1024,
                "stage": 0 if step <= 25 else 1,
                "loss": None if step == 50 else loss,
                "learning_rate": 2e-3 * min(1, step / 10),
                "grad_norm": 1.0,
                "tokens_per_second": 9000 + 10 * step,
                "ceiling_share": 0.31,
            }
        )
        if step % 10 == 0:
            events.append({"event": "validation", "step": step, "tokens": step * 1024, "loss": loss + 0.2})
    seconds = {"backward": 60.0, "forward": 30.0, "optimizer": 8.0, "data": 1.0, "checkpoint": 0.5}
    events.append({"event": "end", "step": 100, "reason": "tokens", "seconds": seconds})
    return events


@pytest.fixture
def hostile() -> str:
    """A line of the first sample that tries to be markup."""
    return HOSTILE


@pytest.fixture
def fresh_run(tmp_path: Path) -> Path:
    """A run folder in which nothing has happened yet: run.json, config.toml and the data."""
    folder = tmp_path / "run"
    about = {
        "format": "lmkern-run",
        "version": 1,
        "data": "data",
        "command": ["/somewhere/bin/lmkern", "demo", "my poems.txt", "--minutes", "3", "--out", "runs/first"],
        "versions": {"lmkern": "0.1.0", "python": "3.11.7", "torch": "2.13.0"},
        "machine": {"processor": "A <b>CPU</b>", "threads": 2},
    }
    write_json(folder / "run.json", about)
    (folder / "config.toml").write_text(CONFIG, encoding="utf-8")
    write_data(folder / "data")
    return folder


@pytest.fixture
def full_run(fresh_run: Path) -> Path:
    """A run folder with everything in it."""
    lines = "\n".join(json.dumps(event) for event in metric_lines())
    (fresh_run / "metrics.jsonl").write_text(lines + "\n", encoding="utf-8")
    (fresh_run / "model").mkdir()
    weights = {"embedding": np.zeros((512, 64), np.float32), "norm": np.zeros(64, np.float32)}
    save_file(weights, fresh_run / "model" / "model.safetensors")
    rows = [
        {"name": "lmkern GPT", "bits_per_byte": 2.4, "perplexity": 55.5},
        {"name": "modified Kneser-Ney 5-gram", "bits_per_byte": 2.0, "perplexity": 33.3},
        {"name": "interpolation", "weight": 0.4, "bits_per_byte": 1.9, "perplexity": 30.0},
        {"name": "xz -9e", "bits_per_byte": 1.97},
        {"name": "xz -9e given the training text", "bits_per_byte": 1.54},
    ]
    write_json(
        fresh_run / "evaluation.json", {"split": "test", "bytes": 240_000, "tokens": 60_000, "rows": rows}
    )
    drawn = {"temperature": 0.8, "top_k": 0, "top_p": 0.95, "seed": 0}
    texts = [
        {"prompt": "The first", "text": f" line\n{HOSTILE}\n```\n# heading\n\x1b[31mred", **drawn},
        {"prompt": "", "text": "From nothing: <b>raw</b>", **drawn},
    ]
    write_json(fresh_run / "samples.json", texts)
    write_json(
        fresh_run / "timings.json", {"prepare": 3.0, "train": 105.0, "evaluate": 20.0, "generate": 4.0}
    )
    return fresh_run
