"""What is done with a trained run: evaluate it, let it write."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmkern.data
from lmkern import models
from lmkern.ceiling import choose_device
from lmkern.data import Dataset, load_tokenizer
from lmkern.data.shards import TOKENIZER
from lmkern.data.tokenizer import END_OF_TEXT_ID
from lmkern.evaluation import evaluate
from lmkern.files import write_json
from lmkern.generation import generate, stream_text
from lmkern.jobs.timings import timed
from lmkern.report.run import Run, read_run
from lmkern.training.run_folder import EVALUATION, MODEL, SAMPLES

Progress = Callable[[str, int, int], None]


def evaluate_run(
    folder: str | Path, *, split: str = "test", progress: Progress = lambda stage, done, total: None
) -> dict[str, Any]:
    """Judge the run's model on a split of its own data; writes evaluation.json and returns it.

    Texts are read in windows as long as the longest rows of the training: later positions were never trained.
    Raises FileNotFoundError where there is no run or no model yet, ValueError for altered data.
    """
    run = read_run(folder)
    dataset = lmkern.data.load(run.data)
    model = load_model(run)
    stages = run.config.get("training", {}).get("stages", ())
    context = min(
        model.config.context, max((stage["context"] for stage in stages), default=model.config.context)
    )
    with timed(run.folder, "evaluate"):
        result = evaluate(model, dataset, split=split, context=context, progress=progress)
    write_json(run.folder / EVALUATION, result)
    return result


def sample_run(
    folder: str | Path,
    *,
    count: int = 3,
    max_new_tokens: int = 160,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Let the run's model continue the beginnings of `count` test documents, and once write from nothing.

    Each is the first draw under the seed; none is chosen. Writes samples.json and returns its content.
    """
    run = read_run(folder)
    dataset = lmkern.data.load(run.data)
    model = load_model(run)
    options: dict[str, Any] = {"temperature": temperature, "top_k": 0, "top_p": top_p, "seed": seed}
    samples = []
    with timed(run.folder, "generate"):
        for prompt in (*beginnings(dataset, count), ""):
            tokens = [dataset.end_of_text, *dataset.tokenizer.encode(prompt).ids]
            ids = generate(model, tokens, max_new_tokens=max_new_tokens, stop=dataset.end_of_text, **options)
            samples.append(
                {"prompt": prompt, "text": "".join(stream_text(dataset.tokenizer, ids)), **options}
            )
    write_json(run.folder / SAMPLES, samples)
    return samples


def continue_text(folder: str | Path, prompt: str, **options: Any) -> Iterator[str]:
    """The run's continuation of the prompt, in pieces as they are drawn; options: those of generate.

    The tokenizer lies beside the weights: the data folder is not needed.
    """
    run = read_run(folder)
    model = load_model(run)
    tokenizer = load_tokenizer(run.folder / MODEL / TOKENIZER)
    tokens = [END_OF_TEXT_ID, *tokenizer.encode(prompt).ids]
    return stream_text(tokenizer, generate(model, tokens, stop=END_OF_TEXT_ID, **options))


def load_model(run: Run) -> models.GPT:
    """The run's best weights, on the accelerator where there is one.

    Raises FileNotFoundError before there are any, ValueError for a model that is not a GPT.
    """
    folder = run.folder / MODEL
    if not folder.is_dir():
        raise FileNotFoundError(
            f"run: {run.folder} holds no model yet; finish the training first: "
            f"lmkern train --data {run.data} --out {run.folder} --resume"
        )
    model = models.load(folder, device=choose_device("auto"))
    if not isinstance(model, models.GPT):
        raise ValueError(
            f"run: {folder} holds a {type(model).__name__}; expected a GPT, as `lmkern train` writes it"
        )
    return model


def beginnings(dataset: Dataset, count: int, words: int = 8) -> list[str]:
    """The first words of documents evenly spread over the test split, but for those that hold no more."""
    beginning = re.compile(rf"\s*(?:\S+\s+){{{words - 1}}}\S+")
    matches = ((beginning.match(text), len(text)) for text in dataset.test.text())
    found = [match[0] for match, length in matches if match and match.end() < length]
    chosen = min(count, len(found))
    return [found[index * len(found) // chosen] for index in range(chosen)]
