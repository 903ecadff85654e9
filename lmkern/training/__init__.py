"""Training runs: configuration, schedule, optimizer, checkpoints, and the loop that ties them."""

from lmkern.training.budget import tokens_for_minutes
from lmkern.training.checkpoint import load_checkpoint
from lmkern.training.config import RunConfig, Stage, TrainingConfig, dump_config, load_config
from lmkern.training.loop import train

__all__ = [
    "RunConfig",
    "Stage",
    "TrainingConfig",
    "dump_config",
    "load_checkpoint",
    "load_config",
    "tokens_for_minutes",
    "train",
]
