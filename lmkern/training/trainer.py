"""The computation of a run: one optimizer step, one validation, and the state between them. No files here."""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmkern.data import Batches, Dataset, PairBatches, PairDataset, PairSplit
from lmkern.data.pair_batches import IGNORED
from lmkern.generation.inference import inference
from lmkern.models import GPTConfig
from lmkern.training.config import ARCHITECTURES, RunConfig, Stage
from lmkern.training.metrics import PhaseClock
from lmkern.training.optimizer import load_optimizer_tensors, make_optimizer, optimizer_tensors
from lmkern.training.schedule import Schedule, StageSpan

# Steps in a row without a finite loss and gradient after which a run is beyond help.
HOPELESS = 20


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step: loss in nats a target, gradient norm before clipping, whether it was taken.

    flops: what the step computed, padding included.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    taken: bool
    flops: float


class Batch(NamedTuple):
    """What a step or a validation reads: rows of tokens, or the two sides of pairs."""

    inputs: Tensor
    """(B, N) int64; of pairs for an encoder-decoder the sources, (B, N_s)."""
    targets: Tensor
    """(B, N) int64, of pairs (B, N_t); IGNORED where nothing counts."""
    source_mask: Tensor | None = None
    """(B, N_s) boolean, False: padding. None: the targets are the inputs one token on."""

    @property
    def counted(self) -> int:
        """Target tokens that count."""
        return int((self.targets != IGNORED).sum())

    @property
    def lengths(self) -> tuple[int, ...]:
        """N, or N_s and N_t."""
        sides = (self.targets,) if self.source_mask is None else (self.inputs, self.targets)
        return tuple(side.shape[1] for side in sides)

    def parts(self, tokens: int) -> list["Batch"]:
        """The rows, in order, in parts of at most so many tokens, at least a row each."""
        rows = max(1, tokens // sum(self.lengths))
        sides = [[None] * len(self.inputs) if side is None else torch.split(side, rows) for side in self]
        return [Batch(*part) for part in zip(*sides, strict=False)]

    def to(self, device: torch.device) -> "Batch":
        """On the device."""
        mask = None if self.source_mask is None else self.source_mask.to(device)
        return Batch(self.inputs.to(device), self.targets.to(device), mask)


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

    def __init__(
        self, config: RunConfig, dataset: Dataset | PairDataset, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config, self.dataset, self.device, self.dtype = config, dataset, device, dtype
        self.schedule = Schedule(config.training)
        self.state = TrainingState()
        self.best: dict[str, Tensor] = {}
        self.average: dict[str, Tensor] = {}
        self.clock = PhaseClock(device)
        torch.manual_seed(derive_seed(config.training.seed, "initial weights"))
        build = next(model for model, kind in ARCHITECTURES.values() if kind is type(config.model))
        self.model: Any = build(config.model).to(device)
        self.optimizer = make_optimizer(self.model, config.training)
        self.validation_batches = _validation_batches(config, dataset)
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
            batch = Batch(*self.batches[span.index](step - span.first)).to(self.device)
            counted = batch.counted
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for part in batch.parts(self._micro_tokens):
            with self.clock.phase("forward"), self.autocast():
                # Over the step's tokens, not the part's: parts of unequal size then weigh what they hold.
                loss = self._loss(part, training.label_smoothing) / counted
            with self.clock.phase("backward"):
                torch.autograd.backward(loss)
            total += loss.detach()
        flops = self.model.flops_per_token(*batch.lengths) * batch.targets.numel()
        with self.clock.phase("optimizer"):
            result = self._update(total, self.schedule.learning_rate(step), flops)
        self._count(step, result)
        return result

    def validate(self) -> tuple[float, float]:
        """Mean loss in nats a target token, without smoothing, and bits per byte over the fixed validation
        batches; keeps the best weights.

        Text is packed at the last stage's context, so the bits are of those rows and not those that
        evaluation finds document by document. Bytes are those of the targets.
        """
        with self.clock.phase("validation"), self._averaged():
            nats = torch.zeros((), dtype=torch.float64, device=self.device)
            counted = bytes_held = 0
            with inference(self.model), self.autocast():
                for batch in self.validation_batches:
                    for part in batch.parts(self._micro_tokens):
                        nats += self._loss(part.to(self.device), 0.0)
                    counted += batch.counted
                    bytes_held += int(self.bytes_of_token[batch.targets[batch.targets != IGNORED]].sum())
            loss = float(nats) / counted
            bits_per_byte = float(nats) / math.log(2) / bytes_held
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
        kept = {"best": self.best, "average": self.average}
        return groups | {name: tensors for name, tensors in kept.items() if tensors}

    def state_dict(self) -> dict[str, Any]:
        """The JSON-able part of the state."""
        return {"training": asdict(self.state), "seconds": self.clock.seconds}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take up what tensors() and state_dict() gave."""
        self.model.load_state_dict(tensors["model"])
        load_optimizer_tensors(self.optimizer, self.model, tensors["optimizer"])
        self.best = dict(tensors.get("best", {}))
        self.average = {name: value.to(self.device) for name, value in tensors.get("average", {}).items()}
        self.state = TrainingState(**state["training"])
        self.clock = PhaseClock(self.device, state["seconds"])

    def autocast(self) -> AbstractContextManager[Any]:
        """Matrix products in the run's dtype; float32 needs nothing."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _loss(self, batch: Batch, label_smoothing: float) -> Tensor:
        """The sum of the loss over the targets that count."""
        source = {} if batch.source_mask is None else {"source_mask": batch.source_mask}
        loss: Tensor = self.model.loss(
            batch.inputs, batch.targets, label_smoothing=label_smoothing, reduction="sum", **source
        )
        return loss

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The running mean in the place of the weights, if there is one."""
        if not self.average:
            yield
            return
        kept = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        try:
            yield
        finally:
            self.model.load_state_dict(kept)

    def _update_average(self) -> None:
        """Take the weights into the running mean, in which step s counts 1 / s at least."""
        weights = self.model.state_dict()
        if not self.average:
            self.average = {name: tensor.clone() for name, tensor in weights.items()}
            return
        share = max(1 - self.config.training.average, 1 / (1 + self.state.step))
        torch._foreach_lerp_(list(self.average.values()), [weights[name] for name in self.average], share)

    def _update(self, loss: Tensor, rate: float, flops: float) -> StepResult:
        clip = self.config.training.clip
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
        if finite:
            # Clipping is a factor on the gradients, which the optimizer applies as it reads them.
            scale = min(1.0, clip / (float(norm) + 1e-6)) if clip else 1.0
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["rate"]
            self.optimizer.step(grad_scale=scale)
            if self.config.training.average:
                self._update_average()
        return StepResult(float(loss), float(norm), rate, finite, flops)

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

    @property
    def _micro_tokens(self) -> int:
        return self.config.training.micro_batch_tokens or self.config.training.batch_tokens


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose of a run, unrelated to those of its other purposes."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _batches(config: RunConfig, dataset: Dataset | PairDataset, span: StageSpan) -> Batches | PairBatches:
    """The training batches of a stage. Stages that read the same unit read it in different orders."""
    training, stage = config.training, span.stage
    seed = derive_seed(training.seed, "stage", span.index)
    if isinstance(dataset, PairDataset):
        return _pair_batches(config, dataset.train, stage, seed)
    return Batches(
        dataset.train,
        unit=stage.unit,
        context=stage.context,
        batch=training.batch_tokens // stage.context,
        seed=seed,
    )


def _pair_batches(config: RunConfig, split: PairSplit, stage: Stage, seed: int) -> PairBatches:
    return PairBatches(
        split,
        batch_tokens=config.training.batch_tokens,
        context=stage.context,
        seed=seed,
        joined=isinstance(config.model, GPTConfig),
    )


def _validation_batches(config: RunConfig, dataset: Dataset | PairDataset) -> list[Batch]:
    """At most validation_tokens of the validation split, the same in every run."""
    stage, most = config.training.stages[-1], config.training.validation_tokens
    if isinstance(dataset, PairDataset):
        batches = _pair_batches(config, dataset.validation, stage, 0)
        few = min(batches.batches_per_epoch, max(1, most // config.training.batch_tokens))
        return [Batch(*batches(index)) for index in range(few)]
    context = stage.context
    held = len(dataset.validation.tokens)
    rows = min(most, held - 1) // context
    if rows < 1:
        raise ValueError(
            f"train: validation needs at least a row of {context} tokens; the validation split holds {held} "
            f"and training.validation_tokens is {most}: give more text, raise "
            "training.validation_tokens or shorten the last stage's context"
        )
    return [Batch(*Batches(dataset.validation, unit="documents", context=context, batch=rows, seed=0)(0))]


def _bytes_of_token(dataset: Dataset | PairDataset) -> Tensor:
    """(V,) int64: bytes of text each token stands for; the end of a text stands for none.

    Byte-level BPE spells a token with one character a byte.
    """
    tokenizer = dataset.tokenizer
    lengths = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.int64)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = len(token)
    lengths[dataset.end_of_text] = 0
    return lengths
