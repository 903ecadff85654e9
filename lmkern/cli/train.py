"""`lmkern train`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from lmkern.cli.main import INTERRUPTED
from lmkern.cli.options import config_defaults, parse, peek
from lmkern.data import DataConfig
from lmkern.data.shards import read_manifest
from lmkern.models import GPTConfig
from lmkern.training import RunConfig, TrainingConfig
from lmkern.training.run_folder import CHECKPOINTS, CONFIG


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a GPT on a data folder, into a run folder.

    Ctrl-C finishes the step and saves; --resume goes on from there, to the same weights bit for bit.
    More stages than one are written in a --config file, as [[training.stages]].

    example:
      lmkern train --data data/mine --out runs/mine --model.layers 6 --training.tokens 5000000
      lmkern train --data data/mine --out runs/mine --resume
    """

    data: Path
    """The data folder that `lmkern prepare` wrote."""
    out: Path
    """The run folder to write."""
    config: Annotated[Path | None, arg(metavar="FILE")] = None
    """A TOML file that gives the defaults of all options below. With --resume: the run's own config.toml."""
    resume: bool = False
    """Go on with the run in the folder."""
    overwrite: bool = False
    """Replace the run in the folder."""
    model: GPTConfig = field(default_factory=GPTConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def run(self) -> int:
        """Train; the live line and the last words are those of the training itself."""
        import lmkern.data
        from lmkern.jobs.timings import record_time
        from lmkern.training import train

        dataset = lmkern.data.load(self.data)
        config = RunConfig(DataConfig(**dataset.manifest["config"]), self.model, self.training)
        result = train(config, dataset, self.out, resume=self.resume, overwrite=self.overwrite)
        record_time(self.out, "train", result["seconds"])
        if result["reason"] == "interrupted":
            return INTERRUPTED
        print(f"next: lmkern evaluate {self.out}; lmkern report {self.out}")
        return 0

    def kept(self) -> str:
        """What an interruption leaves."""
        return f"the last checkpoint is in {self.out / CHECKPOINTS}: --resume goes on from it"


def command(argv: Sequence[str]) -> Train:
    """The command line as a Train; the vocabulary is the data's unless something else is asked for."""
    options = peek(argv, config=Path, data=Path, out=Path, resume=False)
    path = options.config
    if path is None and options.resume and options.out and (options.out / CONFIG).is_file():
        path = options.out / CONFIG
    defaults: dict[str, Any] = {
        name: value for name, value in config_defaults(path).items() if name != "data"
    }
    if path is None and options.data:
        defaults["model"] = replace(GPTConfig(), vocab_size=read_manifest(options.data)["vocab_size"])
    return parse(Train, "train", argv, defaults)
