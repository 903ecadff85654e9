"""What happens at which step: stage, learning rate, validations, checkpoints. Pure functions of the step."""

import math
from dataclasses import dataclass
from functools import cached_property

from lmkern.training.config import Stage, TrainingConfig


@dataclass(frozen=True)
class StageSpan:
    """A stage and the steps first <= step < end that it takes; it may be empty in a short run."""

    index: int
    stage: Stage
    first: int
    end: int


@dataclass(frozen=True)
class Schedule:
    """The course of a run, from its configuration alone. Steps count from 0."""

    config: TrainingConfig

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return max(1, self.config.tokens // self.config.batch_tokens)

    @cached_property
    def spans(self) -> tuple[StageSpan, ...]:
        """The stages with their steps; together they cover every step once."""
        spans: list[StageSpan] = []
        share, first = 0.0, 0
        for index, stage in enumerate(self.config.stages):
            share += stage.share
            last = index == len(self.config.stages) - 1
            end = self.steps if last else min(self.steps, round(share * self.steps))
            spans.append(StageSpan(index, stage, first, end))
            first = end
        return tuple(spans)

    def span(self, step: int) -> StageSpan:
        """The stage that step belongs to."""
        if not 0 <= step < self.steps:
            raise ValueError(f"Schedule.span: step must be in 0 .. {self.steps - 1}; got {step}")
        return next(span for span in self.spans if step < span.end)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, taken in the middle of its tokens: neither end is wasted."""
        return learning_rate(
            self.config, (step + 0.5) * self.config.batch_tokens, self.steps * self.config.batch_tokens
        )

    def validation_due(self, finished: int) -> bool:
        """Whether to validate after so many finished steps: each validate_every tokens, and at the end."""
        return finished == self.steps or self._crosses(self.config.validate_every, finished)

    def checkpoint_due(self, finished: int) -> bool:
        """Whether to save after so many finished steps: each checkpoint_every tokens, but for the end."""
        return finished < self.steps and self._crosses(self.config.checkpoint_every, finished)

    def _crosses(self, every: int, finished: int) -> bool:
        """Whether the last finished step reached or passed a multiple of `every` tokens."""
        if every == 0:
            return False
        tokens = finished * self.config.batch_tokens
        return tokens // every > (tokens - self.config.batch_tokens) // every


def learning_rate(config: TrainingConfig, tokens: float, total: int) -> float:
    """Linear warm-up over warmup * total tokens, then a cosine to final_learning_rate * learning_rate."""
    warmup = config.warmup * total
    if tokens < warmup:
        return config.learning_rate * tokens / warmup
    done = min(1.0, (tokens - warmup) / max(1.0, total - warmup))
    floor = config.final_learning_rate
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
