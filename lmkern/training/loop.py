"""train(): the whole run, from an empty folder or a checkpoint to the best weights in model/."""

import contextlib
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lmkern.ceiling import choose_device, choose_dtype, measure_ceiling
from lmkern.data import Dataset, PairBatches, PairDataset
from lmkern.data.shards import TOKENIZER, identity
from lmkern.memory import keep_freed_memory
from lmkern.models import T5Config, save
from lmkern.ops.dispatch import flag
from lmkern.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lmkern.training.config import RunConfig
from lmkern.training.interruption import Interruption
from lmkern.training.metrics import MetricsLog, rewind_metrics
from lmkern.training.progress import ProgressLine, Smoothed, readable_count, readable_seconds
from lmkern.training.run_folder import (
    CHECKPOINTS,
    METRICS,
    MODEL,
    check_run_folder,
    data_moved,
    held,
    open_run_folder,
    other_data,
    remove_derived,
    write_about,
)
from lmkern.training.trainer import StepResult, Trainer


def train(
    config: RunConfig,
    dataset: Dataset | PairDataset,
    folder: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train the model that config describes and leave its best weights, by validation, in folder/model.

    Writes config.toml, run.json, metrics.jsonl and checkpoints/ as it goes, and the tokenizer beside the
    weights. Before its first step it removes what was made from earlier weights: evaluation, samples, report.

    SIGINT, SIGTERM or SIGHUP finishes the step, saves and returns with reason "interrupted"; a second SIGINT
    stops at once, and the run goes on from its last checkpoint. With resume=True it then gives bit-identical
    weights and metrics to a run that was never interrupted, on the same machine with the same number of
    threads.

    config.data only describes: the text comes from dataset. progress: show a live line on stderr.

    Returns {"reason": "tokens" | "early stopping" | "interrupted", "steps", "tokens", "seconds", "loss",
    "validation_loss", "best_validation_loss", "best_bits_per_byte", "best_step", "skipped_steps"}; losses are
    in nats a token. Raises FileExistsError for a folder that holds a run, and for one in which another
    process trains; FileNotFoundError for resume without a run; ValueError for a configuration that does not
    fit the data, the model or the run to resume, or a damaged checkpoint; and FloatingPointError when the
    loss stays not finite.
    """
    folder = Path(folder)
    resume, overwrite = flag("train", "resume", resume), flag("train", "overwrite", overwrite)
    line = ProgressLine(flag("train", "progress", progress))
    check_fits(config, dataset)
    keep_freed_memory()
    check_run_folder(config, folder, resume=resume, overwrite=overwrite)
    device = choose_device(config.training.device)
    cuda = [device] if device.type == "cuda" else []
    with (
        held(folder),
        torch.random.fork_rng(devices=cuda),
        cpu_threads(config.training.threads),
        Interruption() as interruption,
    ):
        # Once more: until now another process may have written.
        path = check_run_folder(config, folder, resume=resume, overwrite=overwrite)
        checkpoint = load_checkpoint(path) if path else None
        resolved = _resolve(config, dataset, device, checkpoint)
        trainer = Trainer(config, dataset, device, getattr(torch, resolved["dtype"]))
        # Only now, when data, model and configuration have proved to fit, may an older run make room.
        open_run_folder(folder, fresh=not resume)
        rewind_metrics(folder / METRICS, checkpoint.step if checkpoint else 0)
        if checkpoint is None:
            write_about(config, dataset, folder, resolved)
        else:
            data_moved(dataset, folder)
        with MetricsLog(folder / METRICS) as log:
            run = _Run(trainer, folder, log, line, resolved, interruption)
            if checkpoint is not None:
                run.restore(checkpoint)
            try:
                return run.go()
            finally:
                line.close()


class _Run:
    """A trainer with its files: what is written when, and when to stop."""

    def __init__(
        self,
        trainer: Trainer,
        folder: Path,
        log: MetricsLog,
        line: ProgressLine,
        resolved: dict[str, Any],
        interruption: Interruption,
    ) -> None:
        self.trainer, self.folder, self.log, self.line = trainer, folder, log, line
        self.resolved, self.interruption = resolved, interruption
        self.smoothed_loss, self.smoothed_speed = Smoothed(), Smoothed()
        self.seconds_before = 0.0
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall seconds of training so far, over all the parts of an interrupted run."""
        return self.seconds_before + time.perf_counter() - self.started

    @property
    def tokens(self) -> int:
        return self.trainer.state.step * self.trainer.config.training.batch_tokens

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint."""
        self.trainer.restore(checkpoint.state, checkpoint.tensors)
        self.seconds_before = checkpoint.state["elapsed"]
        threads = checkpoint.state["resolved"]["threads"]
        if threads != self.resolved["threads"]:
            self.line.say(
                f"resumed with {self.resolved['threads']} threads after {threads}: results will agree with "
                "an uninterrupted run to rounding only"
            )

    def go(self) -> dict[str, Any]:
        """Step until the tokens are used up, patience is lost or someone interrupts; then save."""
        trainer, schedule = self.trainer, self.trainer.schedule
        state = trainer.state
        self._event("resume" if state.step else "start", **self.resolved)
        reason = trainer.finished()
        if reason is None:
            remove_derived(self.folder)
        while reason is None:
            step = state.step
            span = schedule.span(step)
            if step == span.first:
                stage: dict[str, Any] = {"unit": span.stage.unit, "context": span.stage.context}
                batches = trainer.batches[span.index]
                if isinstance(batches, PairBatches):
                    stage |= {"padding": batches.padding, "left_out": batches.left_out}
                    self.line.say(
                        f"stage {span.index + 1}: {batches.batches_per_epoch} batches an epoch, "
                        f"{batches.padding:.1%} of their tokens padding, {batches.left_out} pairs too long"
                    )
                self._event("stage", stage=span.index, **stage, steps=span.end - span.first)
            start = time.perf_counter()
            result = trainer.step(step)
            self._report(result, step, time.perf_counter() - start)
            if schedule.validation_due(state.step):
                self._validate()
            reason = trainer.finished() or ("interrupted" if self.interruption.requested else None)
            if reason is not None or schedule.checkpoint_due(state.step):
                self._save()
        return self._finish(reason)

    def _validate(self) -> None:
        loss, bits_per_byte = self.trainer.validate()
        self._event("validation", loss=loss, bits_per_byte=bits_per_byte)
        state = self.trainer.state
        note = "best so far" if state.waited == 0 else f"best was {state.best_loss or float('nan'):.4f}"
        self.line.say(
            f"step {state.step}/{self.trainer.schedule.steps}: validation loss {loss:.4f} nats a token, "
            f"{bits_per_byte:.3f} bits per byte ({note})"
        )

    def _save(self) -> None:
        trainer = self.trainer
        with trainer.clock.phase("checkpoint"):
            self.log.flush_to_disk()
            state = trainer.state_dict() | {
                "tokens": self.tokens,
                "elapsed": self.seconds,
                "resolved": self.resolved,
            }
            state["corpus_sha256"] = trainer.dataset.manifest["corpus"]["sha256"]
            state["data_sha256"] = identity(trainer.dataset.manifest)
            path = save_checkpoint(
                self.folder / CHECKPOINTS,
                trainer.state.step,
                trainer.tensors(),
                state,
                keep=trainer.config.training.keep_checkpoints,
            )
        self._event("checkpoint", path=str(path.relative_to(self.folder)))

    def _finish(self, reason: str) -> dict[str, Any]:
        """Write the best weights and the tokenizer to model/, and the last event; say how to go on."""
        trainer, state = self.trainer, self.trainer.state
        if trainer.best:
            trainer.model.load_state_dict(trainer.best)
        save(trainer.model, self.folder / MODEL, beside=(trainer.dataset.folder / TOKENIZER,))
        summary = {
            "loss": state.loss,
            "validation_loss": state.validation_loss,
            "best_validation_loss": state.best_loss,
            "best_bits_per_byte": state.best_bits_per_byte,
            "best_step": state.best_step,
            "skipped_steps": state.skipped,
        }
        elapsed = self.seconds
        self._event("end", reason=reason, seconds=trainer.clock.seconds, elapsed=elapsed, **summary)
        self.line.say(self._last_words(reason, elapsed))
        return {"reason": reason, "steps": state.step, "tokens": self.tokens, "seconds": elapsed, **summary}

    def _last_words(self, reason: str, elapsed: float) -> str:
        state = self.trainer.state
        done = f"{state.step} steps, {readable_count(self.tokens)} tokens, {readable_seconds(elapsed)}"
        if state.skipped:
            done += f", {state.skipped} steps skipped"
        if reason == "interrupted":
            data, out = str(self.trainer.dataset.folder), str(self.folder)
            again = shlex.join(("lmkern", "train", "--data", data, "--out", out, "--resume"))
            return f"interrupted after {done}; everything is saved in {self.folder}. To go on: {again}"
        why = "the token budget is used up" if reason == "tokens" else "validation no longer improves"
        return (
            f"trained: {done}; {why}. The best weights (step {state.best_step}) are in {self.folder / MODEL}"
        )

    def _report(self, result: StepResult, step: int, seconds: float) -> None:
        """The step's event and the live line."""
        trainer, span = self.trainer, self.trainer.schedule.span(step)
        speed = trainer.config.training.batch_tokens / seconds
        ceiling_share = result.flops / seconds / self.resolved["ceiling_flops"]
        self._event(
            "step",
            stage=span.index,
            loss=result.loss,
            learning_rate=result.learning_rate,
            grad_norm=result.grad_norm,
            skipped=not result.taken,
            tokens_per_second=speed,
            ceiling_share=ceiling_share,
            seconds=self.seconds,
        )
        state, steps = trainer.state, trainer.schedule.steps
        if not result.taken:
            self.line.say(
                f"step {state.step}/{steps}: skipped, loss {result.loss}, gradient norm {result.grad_norm} "
                f"({state.skipped} skipped so far)"
            )
            return
        loss, smooth_speed = self.smoothed_loss.add(result.loss), self.smoothed_speed.add(speed)
        left = (steps - state.step) * trainer.config.training.batch_tokens / smooth_speed
        stages = len(trainer.schedule.spans)
        self.line.update(
            f"stage {span.index + 1}/{stages} {span.stage.unit} x{span.stage.context} | "
            f"step {state.step}/{steps} | loss {loss:.3f} | lr {result.learning_rate:.1e} | "
            f"{readable_count(smooth_speed)} tokens/s | {ceiling_share:.0%} of ceiling | "
            f"{readable_seconds(left)} left",
            force=state.step == steps,
        )

    def _event(self, event: str, **values: Any) -> None:
        self.log.write(event, step=self.trainer.state.step, tokens=self.tokens, **values)


def _resolve(
    config: RunConfig, dataset: Dataset | PairDataset, device: torch.device, checkpoint: Checkpoint | None
) -> dict[str, Any]:
    """dtype, device, threads and measured ceiling of this run; a resumed run keeps its dtype."""
    if checkpoint is not None and (other := other_data(checkpoint.state, dataset.manifest)):
        raise ValueError(
            f"train: to resume, the data must be that of the run: {other}: give the folder that the run was "
            "started on"
        )
    if checkpoint is not None:
        dtype = getattr(torch, checkpoint.state["resolved"]["dtype"])
    elif config.training.dtype == "auto":
        dtype = choose_dtype(device)
    else:
        dtype = getattr(torch, config.training.dtype)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "ceiling_flops": measure_ceiling(device, dtype),
    }


def check_fits(config: RunConfig, dataset: Dataset | PairDataset) -> None:
    """Raises ValueError for a model with fewer tokens than the data, or other ends, and for other stages."""
    found, asked = isinstance(dataset, PairDataset), config.training.stages[0].unit == "pairs"
    if found != asked:
        kind, unit = ("pairs", "pairs") if found else ("text", "documents")
        raise ValueError(
            f"train: {dataset.folder} holds {kind} and the stages read {config.training.stages[0].unit}: set "
            f"unit = {unit!r} in training.stages"
        )
    if isinstance(config.model, T5Config):
        for name in ("start", "end"):
            if getattr(config.model, name) != dataset.end_of_text:
                raise ValueError(
                    f"train: model.{name} must be the data's end of text, {dataset.end_of_text}; "
                    f"got {getattr(config.model, name)}: set model.{name} = {dataset.end_of_text}"
                )
    held = dataset.tokenizer.get_vocab_size()
    if config.model.vocab_size < held:
        raise ValueError(
            f"train: model.vocab_size must be at least that of the data's tokenizer, {held}; "
            f"got {config.model.vocab_size}: set model.vocab_size = {held}"
        )


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """So many CPU threads inside; 0: as many as there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
