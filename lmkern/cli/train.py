"""`lmkern train`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from lmkern.cli.main import INTERRUPTED
from lmkern.cli.options import config_defaults, parse, peek
from lmkern.data import DataConfig
from lmkern.data.shards import PAIRS_FORMAT, read_manifest
from lmkern.models import GPTConfig, T5Config
from lmkern.training import RunConfig, Stage, TrainingConfig
from lmkern.training.run_folder import CHECKPOINTS, CONFIG


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model on a data folder, into a run folder.

    A GPT on text, an encoder-decoder (t5) on pairs unless --architecture says otherwise; each has options of
    its own.
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
    """A TOML file whose tables [model] and [training] give the defaults of the options of these names. With
    --resume: the run's own config.toml."""
    resume: bool = False
    """Go on with the run in the folder."""
    overwrite: bool = False
    """Replace the run in the folder."""
    architecture: Literal["gpt", "t5"] = "gpt"
    """What to train. Default: gpt on text, t5 on pairs, or what the file's [model] says:
    architecture = "t5"."""
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


@dataclass(frozen=True, kw_only=True)
class TrainT5(Train):
    __doc__ = Train.__doc__

    model: T5Config = field(default_factory=T5Config)  # type: ignore[assignment]


def command(argv: Sequence[str]) -> Train:
    """The command line as a Train, its model's options those of the architecture.

    The vocabulary is the data's unless the file names one. Without a file, pairs get an encoder-decoder and a
    stage of their own.
    """
    options = peek(argv, config=Path, data=Path, out=Path, architecture=str, resume=False)
    path = options.config
    if path is None and options.resume and options.out and (options.out / CONFIG).is_file():
        path = options.out / CONFIG
    manifest = read_manifest(options.data) if options.data else {}
    defaults = config_defaults(path, manifest.get("vocab_size"))
    defaults.pop("data", None)
    if path is None and manifest:
        pairs = manifest["format"] == PAIRS_FORMAT
        if (options.architecture or ("t5" if pairs else "gpt")) == "t5":
            defaults["model"] = T5Config(vocab_size=manifest["vocab_size"], scaled_scores=True)
        else:
            defaults["model"] = replace(GPTConfig(), vocab_size=manifest["vocab_size"])
        if pairs:
            rate = 10.0 if isinstance(defaults["model"], T5Config) else 1.0
            defaults["training"] = TrainingConfig(
                stages=(Stage("pairs"),), label_smoothing=0.1, embedding_rate=rate
            )
    t5 = isinstance(defaults.get("model"), T5Config)
    if options.architecture not in (None, "t5" if t5 else "gpt"):
        raise ValueError(
            f"train: --architecture {options.architecture} and {path}, which is of another: leave one out"
        )
    defaults["architecture"] = "t5" if t5 else "gpt"
    return parse(TrainT5 if t5 else Train, "train", argv, defaults)
