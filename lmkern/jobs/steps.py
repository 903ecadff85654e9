"""What is done with a trained run: evaluate it, let it write."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch

import lmkern.data
from lmkern import models
from lmkern.ceiling import choose_device
from lmkern.data import Dataset, PairDataset, load_tokenizer
from lmkern.data.shards import TOKENIZER
from lmkern.data.tokenizer import END_OF_TEXT_ID, lone_surrogate
from lmkern.evaluation import evaluate, evaluate_pairs
from lmkern.files import write_json, write_text
from lmkern.generation import PrefixDecoder, generate, rewrite, stream_text
from lmkern.generation.beam import EncoderDecoder
from lmkern.jobs.timings import timed
from lmkern.report.run import Run, read_run
from lmkern.training.config import Stage
from lmkern.training.run_folder import CONFIG, EVALUATION, MODEL, OUTPUTS, SAMPLES, other_data

Progress = Callable[[str, int, int], None]


def evaluate_run(
    folder: str | Path,
    *,
    split: str = "test",
    beams: int = 5,
    length_penalty: float = 1.0,
    progress: Progress = lambda stage, done, total: None,
    note: Callable[[str], object] = warnings.warn,
) -> dict[str, Any]:
    """Judge the run's model on a split of its own data; writes evaluation.json and returns it.

    Texts are read in windows as long as the longest rows of the training: later positions were never trained.
    Targets of pairs are searched to that length, and written to outputs.txt, a line each.
    beams, length_penalty: of that search, as in beam_search; text has none. note: as in rewrite.
    Raises FileNotFoundError where there is no run or no model yet, ValueError for altered data.
    """
    run = read_run(folder)
    dataset = _data("evaluate", run)
    if isinstance(dataset, PairDataset):
        model = load_rewriter(run)
        with timed(run.folder, "evaluate"):
            result = evaluate_pairs(
                model,
                dataset,
                split=split,
                beams=beams,
                length_penalty=length_penalty,
                max_new_tokens=_longest_row(run),
                progress=progress,
                note=note,
            )
        # A target may hold line ends; here they are spaces.
        lines = (" ".join(output.split()) + "\n" for output in result.pop("outputs"))
        write_text(run.folder / OUTPUTS, "".join(lines))
    else:
        gpt = load_model(run)
        context = min(gpt.config.context, _longest_row(run))
        with timed(run.folder, "evaluate"):
            result = evaluate(gpt, dataset, split=split, context=context, progress=progress)
    write_json(run.folder / EVALUATION, result)
    return result


def _data(name: str, run: Run) -> Dataset | PairDataset:
    """What the run was trained on. ValueError where something else now lies in its place: the model knows
    other tokens, or has seen what is to judge it."""
    dataset = lmkern.data.load(run.data)
    if other := other_data(run.about, dataset.manifest):
        raise ValueError(
            f"{name}: {run.data} is not what the run in {run.folder} was trained on: {other}. Prepare it as "
            f"it was ({run.folder / CONFIG} says how), or train anew"
        )
    return dataset


def translate(folder: str | Path, sources: Sequence[str], **search: Any) -> list[str]:
    """The target that the run's model gives each source; search: options of rewrite.

    The tokenizer lies beside the weights: the data folder is not needed. Raises ValueError for a source that
    is no Unicode text.
    """
    for number, source in enumerate(sources, 1):
        _check_text(f"translate: source {number}", source)
    run = read_run(folder)
    tokenizer = load_tokenizer(run.folder / MODEL / TOKENIZER)
    return rewrite(load_rewriter(run), tokenizer, sources, max_new_tokens=_longest_row(run), **search)


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
    model = load_model(run)
    dataset = cast(Dataset, _data("generate", run))
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


def continue_text(
    folder: str | Path, prompt: str, *, dtype: str = "float32", **options: Any
) -> Iterator[str]:
    """The run's continuation of the prompt, in pieces as they are drawn; options: those of generate.

    dtype: of the weights. The tokenizer lies beside them: the data folder is not needed. Raises ValueError
    for a prompt that is no Unicode text.
    """
    _check_text("generate: prompt", prompt)
    run = read_run(folder)
    model = load_model(run).to(getattr(torch, dtype))
    tokenizer = load_tokenizer(run.folder / MODEL / TOKENIZER)
    tokens = [END_OF_TEXT_ID, *tokenizer.encode(prompt).ids]
    return stream_text(tokenizer, generate(model, tokens, stop=END_OF_TEXT_ID, **options))


def load_model(run: Run) -> models.GPT:
    """The run's best weights, on the accelerator where there is one.

    Raises FileNotFoundError before there are any, ValueError for a model that is not a GPT.
    """
    model = _load(run)
    if not isinstance(model, models.GPT):
        raise ValueError(
            f"run: {run.folder / MODEL} holds a {type(model).__name__}; expected a GPT, as `lmkern train` "
            "writes it from text; a model of pairs reads with `lmkern translate`"
        )
    return model


def load_rewriter(run: Run) -> EncoderDecoder:
    """The run's best weights as beam search takes them; a decoder reads the source as a prefix.

    Raises FileNotFoundError before there are any, ValueError for a model that has not learned from pairs.
    """
    model = _load(run)
    if _stages(run)[0].get("unit") == "pairs":
        if isinstance(model, models.T5):
            return model
        if isinstance(model, models.GPT):
            return PrefixDecoder(model, END_OF_TEXT_ID)
    raise ValueError(
        f"run: {run.folder} is a run on text, which continues a prompt: `lmkern generate`; expected a run on "
        "pairs"
    )


def _load(run: Run) -> Any:
    folder = run.folder / MODEL
    if not folder.is_dir():
        raise FileNotFoundError(
            f"run: {run.folder} holds no model yet; finish the training first: "
            f"lmkern train --data {run.data} --out {run.folder} --resume"
        )
    return models.load(folder, device=choose_device("auto"))


def _check_text(name: str, text: str) -> None:
    if (at := lone_surrogate(text)) is not None:
        raise ValueError(
            f"{name} must be Unicode text; got {text[at]!a} at character {at}: a byte that is not UTF-8, or "
            "half of a surrogate pair; give it in UTF-8"
        )


def _stages(run: Run) -> Sequence[dict[str, Any]]:
    return run.config.get("training", {}).get("stages") or ({},)


def _longest_row(run: Run) -> int:
    """The longest context of a stage, in tokens."""
    return max(int(stage.get("context", Stage.context)) for stage in _stages(run))


def beginnings(dataset: Dataset, count: int, words: int = 8) -> list[str]:
    """The first words of documents evenly spread over the test split, but for those that hold no more."""
    beginning = re.compile(rf"\s*(?:\S+\s+){{{words - 1}}}\S+")
    matches = ((beginning.match(text), len(text)) for text in dataset.test.text())
    found = [match[0] for match, length in matches if match and match.end() < length]
    chosen = min(count, len(found))
    return [found[index * len(found) // chosen] for index in range(chosen)]
