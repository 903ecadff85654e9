"""`lmkern demo`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, cast

from tyro.conf import Positional, Suppress, arg

from lmkern.cli.main import INTERRUPTED
from lmkern.cli.options import config_defaults, parse, peek
from lmkern.cli.show import columns
from lmkern.data import DataConfig
from lmkern.jobs.demo import demo, preset
from lmkern.models import GPTConfig
from lmkern.report.results import result_table
from lmkern.training import RunConfig, TrainingConfig
from lmkern.training.run_folder import DATA, PAGE


@dataclass(frozen=True, kw_only=True)
class Demo(DataConfig):
    """Text in; a trained, judged and writing model and its report out.

    Prepares the text, trains a GPT in stages, compares it with a 5-gram model and xz on unseen text, writes
    samples and a report, all into a new folder. Without files it takes the documentation inside this Python.
    Model and schedule follow from --minutes; every option below overrides them.

    example:
      lmkern demo
      lmkern demo book.txt --minutes 20 --out runs/book
    """

    paths: Positional[Annotated[tuple[str, ...], arg(metavar="PATHS")]] = ()
    """Text files and folders. Default: the embedded corpus."""
    train: Suppress[tuple[str, ...]] = ()
    validation: Suppress[tuple[str, ...]] = ()
    test: Suppress[tuple[str, ...]] = ()
    minutes: float = 3.0
    """How long the whole may take; the training gets what the rest leaves."""
    tokens: int = 0
    """The training's budget, in place of what fits the minutes: the same on every machine. 0: measure."""
    out: Path = field(default_factory=lambda: Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S"))
    """The run folder to write."""
    config: Annotated[Path | None, arg(metavar="FILE")] = None
    """A TOML file that gives the defaults of data, model and training, its tokens among them."""
    model: GPTConfig = field(default_factory=lambda: cast(GPTConfig, preset(3).model))
    training: TrainingConfig = field(default_factory=lambda: preset(3).training)

    def run(self) -> int:
        """Run it all; end with the table, a sample and where the report is."""
        settings = asdict(self)
        data = DataConfig(**{field.name: settings[field.name] for field in fields(DataConfig)})
        config = RunConfig(data, self.model, self.training)
        run = demo(config, self.out, minutes=self.minutes, tokens=self.tokens)
        if run is None:
            print(f"to go on: lmkern train --data {self.out / DATA} --out {self.out} --resume")
            return INTERRUPTED
        if run.evaluation:
            print("\n" + columns(result_table(run.evaluation)))
        if run.samples:
            print(f"\n{run.samples[0]['prompt']}{run.samples[0]['text']}")
        print(f"\nreport: {run.folder / PAGE}")
        return 0

    def kept(self) -> str:
        """What an interruption leaves."""
        return f"what was finished is in {self.out}"


def command(argv: Sequence[str]) -> Demo:
    """The command line as a Demo: the options' defaults are those of the minutes, or of the file."""
    options = peek(argv, config=Path, minutes=float, **{"training.tokens": int})
    chosen = preset(3.0 if options.minutes is None else options.minutes)
    defaults: dict[str, Any] = {"model": chosen.model, "training": chosen.training}
    if options.config:
        found = config_defaults(options.config)
        defaults = asdict(found["data"]) | {name: found[name] for name in ("model", "training")}
        defaults["tokens"] = found["training"].tokens
        if not isinstance(found["model"], GPTConfig):
            raise ValueError(
                f"demo: a demo trains a GPT on text; {options.config} is of another model: `lmkern train`"
            )
    if tokens := getattr(options, "training.tokens"):
        defaults["tokens"] = tokens
    return parse(Demo, "demo", argv, defaults)
