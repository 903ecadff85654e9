"""The computation of a run: one optimizer step, one validation, and the state between them. No files here."""

import contextlib
import hashlib
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lmkern.data import Batches, Dataset
from lmkern.generation.inference import inference
from lmkern.models import GPT
from lmkern.training.config import RunConfig
from lmkern.training.metrics import PhaseClock
from lmkern.training.optimizer import load_optimizer_tensors, make_optimizer, optimizer_tensors
from lmkern.training.schedule import Schedule, StageSpan

# Steps in a row without a finite loss and gradient after which a run is beyond help.
HOPELESS = 20


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step: loss in nats a token, gradient norm before clipping, whether it was taken."""

    loss: float
    grad_norm: float
    learning_rate: float
    taken: bool


@dataclass
class TrainingState:
    """Where a run stands, beside its tensors. With them it is all that a resumed run needs."""

    step: int = 0
    """Finished steps, the skipped ones among them."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    loss: float | None = None
    """Of the last step; None where it was not finite."""
    validation_loss: float | None = None
    best_loss: float | None = None
    best_bits_per_byte: float | None = None
    best_step: int | None = None
    waited: int = 0
    """Validations since the best one."""


class Trainer:
    """Model, optimizer and state of a run.

    Every random choice is a function of (seed, step): initial weights, order of the data, dropout. So a run
    that goes on from the state after a step computes what it would have computed anyway: bit for bit on the
    same machine with the same number of threads, where the device's kernels are deterministic (the CPU's
    are).
    """

    def __init__(self, config: RunConfig, dataset: Dataset, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.dataset, self.device, self.dtype = config, dataset, device, dtype
        self.schedule = Schedule(config.training)
        self.state = TrainingState()
        self.best: dict[str, Tensor] = {}
        self.clock = PhaseClock(device)
        torch.manual_seed(derive_seed(config.training.seed, "initial weights"))
        self.model = GPT(config.model).to(device)
        self.optimizer = make_optimizer(self.model, config.training)
        self.validation_rows = _validation_rows(config, dataset)
        self.bytes_of_token = _bytes_of_token(dataset)
        self.batches = [_batches(config, dataset, span) for span in self.schedule.spans]

    def step(self, step: int) -> StepResult:
        """Compute one optimizer step: mean of the loss over all tokens of the step, clipped, AdamW.

        A loss or gradient that is not finite leaves parameters and optimizer as they were; it is counted in
        the state. Raises FloatingPointError when that happens HOPELESS times in a row.
        """
        training, span = self.config.training, self.schedule.span(step)
        torch.manual_seed(derive_seed(training.seed, "step", step))
        with self.clock.phase("data"):
            inputs, targets = self.batches[span.index](step - span.first)  # (rows, context) both
            inputs, targets = inputs.to(self.device), targets.to(self.device)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        rows = self._micro_rows(span.stage.context)
        for x, y in zip(torch.split(inputs, rows), torch.split(targets, rows), strict=True):
            with self.clock.phase("forward"), self.autocast():
                # Over the step's tokens, not the part's: parts of unequal size then weigh what they hold.
                part = self.model.loss(x, y, reduction="sum") / targets.numel()
            with self.clock.phase("backward"):
                torch.autograd.backward(part)
            total += part.detach()
        with self.clock.phase("optimizer"):
            result = self._update(total, self.schedule.learning_rate(step))
        self._count(step, result)
        return result

    def validate(self) -> tuple[float, float]:
        """Mean loss in nats a token and bits per byte over the fixed validation rows; keeps the best weights.

        The rows are documents packed at the last stage's context, so the bits are of those rows and not
        those that evaluation finds document by document.
        """
        with self.clock.phase("validation"):
            inputs, targets = self.validation_rows
            nats = torch.zeros((), dtype=torch.float64, device=self.device)
            rows = self._micro_rows(inputs.shape[1])
            with inference(self.model), self.autocast():
                for x, y in zip(torch.split(inputs, rows), torch.split(targets, rows), strict=True):
                    nats += self.model.loss(x.to(self.device), y.to(self.device), reduction="sum")
            loss = float(nats) / targets.numel()
            bits_per_byte = float(nats) / math.log(2) / int(self.bytes_of_token[targets].sum())
            self._judge(loss, bits_per_byte)
        return loss, bits_per_byte

    def finished(self) -> str | None:
        """Why there is nothing left to do, "tokens" or "early stopping"; None while there is."""
        if self.state.step >= self.schedule.steps:
            return "tokens"
        patience = self.config.training.patience
        return "early stopping" if patience and self.state.waited >= patience else None

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Weights, optimizer state and, once validated, the best weights, for a checkpoint."""
        groups = {
            "model": self.model.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer, self.model),
        }
        return groups | ({"best": self.best} if self.best else {})

    def state_dict(self) -> dict[str, Any]:
        """The JSON-able part of the state."""
        return {"training": asdict(self.state), "seconds": self.clock.seconds}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take up what tensors() and state_dict() gave."""
        self.model.load_state_dict(tensors["model"])
        load_optimizer_tensors(self.optimizer, self.model, tensors["optimizer"])
        self.best = dict(tensors.get("best", {}))
        self.state = TrainingState(**state["training"])
        self.clock = PhaseClock(self.device, state["seconds"])

    def autocast(self) -> AbstractContextManager[Any]:
        """Matrix products in the run's dtype; float32 needs nothing."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _update(self, loss: Tensor, rate: float) -> StepResult:
        clip = self.config.training.clip
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
        if finite:
            # Clipping is a factor on the gradients, which the optimizer applies as it reads them.
            scale = min(1.0, clip / (float(norm) + 1e-6)) if clip else 1.0
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step(grad_scale=scale)
        return StepResult(float(loss), float(norm), rate, finite)

    def _count(self, step: int, result: StepResult) -> None:
        state = self.state
        state.step = step + 1
        state.loss = result.loss if math.isfinite(result.loss) else None
        state.skipped += not result.taken
        state.skipped_in_a_row = 0 if result.taken else state.skipped_in_a_row + 1
        if state.skipped_in_a_row >= HOPELESS:
            raise FloatingPointError(
                f"train: {HOPELESS} steps in a row had no finite loss or gradient (the last: {state.step}): "
                "lower training.learning_rate, or take training.dtype = 'float32', and start again"
            )

    def _judge(self, loss: float, bits_per_byte: float) -> None:
        state = self.state
        state.validation_loss = loss if math.isfinite(loss) else None
        if math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss):
            state.best_loss, state.best_bits_per_byte = loss, bits_per_byte
            state.best_step, state.waited = state.step, 0
            self.best = {
                name: tensor.to("cpu", copy=True) for name, tensor in self.model.state_dict().items()
            }
        else:
            state.waited += 1

    def _micro_rows(self, context: int) -> int:
        training = self.config.training
        return (training.micro_batch_tokens or training.batch_tokens) // context


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose of a run, unrelated to those of its other purposes."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _batches(config: RunConfig, dataset: Dataset, span: StageSpan) -> Batches:
    """The training batches of a stage. Stages that read the same unit read it in different orders."""
    return Batches(
        dataset.train,
        unit=span.stage.unit,
        context=span.stage.context,
        batch=config.training.batch_tokens // span.stage.context,
        seed=derive_seed(config.training.seed, "stage", span.index),
    )


def _validation_rows(config: RunConfig, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (rows, context) int64: at most validation_tokens, the same in every run."""
    context = config.training.stages[-1].context
    held = len(dataset.validation.tokens)
    rows = min(config.training.validation_tokens, held - 1) // context
    if rows < 1:
        raise ValueError(
            f"train: validation needs at least a row of {context} tokens; the validation split holds {held} "
            f"and training.validation_tokens is {config.training.validation_tokens}: give more text, raise "
            "training.validation_tokens or shorten the last stage's context"
        )
    return Batches(dataset.validation, unit="documents", context=context, batch=rows, seed=0)(0)


def _bytes_of_token(dataset: Dataset) -> Tensor:
    """(V,) int64: bytes of text each token stands for; the end of a text stands for none.

    Byte-level BPE spells a token with one character a byte.
    """
    tokenizer = dataset.tokenizer
    lengths = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.int64)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = len(token)
    lengths[dataset.end_of_text] = 0
    return lengths
