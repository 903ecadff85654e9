"""How many tokens fit into a time: measured beforehand, so that the schedule itself counts tokens."""

import dataclasses
import time

import torch

from lmkern.ceiling import choose_device, choose_dtype
from lmkern.data import Dataset, PairDataset
from lmkern.memory import keep_freed_memory
from lmkern.training.config import RunConfig
from lmkern.training.loop import check_fits, cpu_threads
from lmkern.training.trainer import Trainer

# A stage is measured for so many steps after the first, or until this many seconds have passed.
STEPS, SECONDS = 5, 2.0


def tokens_for_minutes(config: RunConfig, dataset: Dataset | PairDataset, minutes: float) -> int:
    """The largest number of tokens, in whole steps, with which train() is expected to take this long.

    Takes a few steps of each stage and one validation on a throw-away model, and counts the validations that
    config asks for; config.training.tokens is not read. At least one step. Raises ValueError for minutes not
    above 0.
    """
    if not minutes > 0:
        raise ValueError(f"tokens_for_minutes: minutes must be above 0; got {minutes}")
    check_fits(config, dataset)
    keep_freed_memory()
    training = config.training
    device = choose_device(training.device)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), cpu_threads(training.threads):
        dtype = choose_dtype(device) if training.dtype == "auto" else getattr(torch, training.dtype)
        # Long enough for every stage to hold the steps that are measured.
        steps = max(round((STEPS + 2) / stage.share) for stage in training.stages)
        trial = dataclasses.replace(training, tokens=steps * training.batch_tokens)
        trainer = Trainer(dataclasses.replace(config, training=trial), dataset, device, dtype)
        step = sum(span.stage.share * _step_seconds(trainer, span.first) for span in trainer.schedule.spans)
        start = time.perf_counter()
        trainer.validate()
        validation = time.perf_counter() - start
    # The last validation is always there; the others come every so many tokens.
    often = training.batch_tokens / training.validate_every if training.validate_every else 0.0
    left = minutes * 60 - validation
    return max(1, int(left / (step + often * validation))) * training.batch_tokens


def _step_seconds(trainer: Trainer, first: int) -> float:
    """Seconds of the fastest step from `first` on: what the machine can do when nothing else disturbs it.

    The first one, which allocates, is not counted. A median of so few would take a busy moment for the speed.
    """
    trainer.step(first)
    seconds: list[float] = []
    while len(seconds) < STEPS and (not seconds or sum(seconds) < SECONDS):
        start = time.perf_counter()
        trainer.step(first + 1 + len(seconds))
        seconds.append(time.perf_counter() - start)
    return min(seconds)
