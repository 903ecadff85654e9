"""`lmkern prepare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from lmkern.cli.options import config_defaults, parse, peek
from lmkern.data import DataConfig


@dataclass(frozen=True, kw_only=True)
class Prepare(DataConfig):
    """Clean, split and tokenize text into a data folder that `lmkern train` reads.

    Files of text, and folders of them; without any, the documentation inside this Python. With --train, pairs
    of texts, a source and its target, from JSON lines or two parallel files.

    example:
      lmkern prepare book.txt notes/ --out data/mine
      lmkern prepare --vocab-size 8192 --out data/python
      lmkern prepare --train pairs.jsonl --out data/pairs
      lmkern prepare --train train.de train.en --validation val.de val.en --out data/translation
    """

    paths: Positional[Annotated[tuple[str, ...], arg(metavar="PATHS")]] = ()
    """Text files and folders. Default: the embedded corpus."""
    out: Path
    """The data folder to write."""
    config: Annotated[Path | None, arg(metavar="FILE")] = None
    """A TOML file whose [data] table gives the defaults."""
    overwrite: bool = False
    """Replace the data in the folder."""

    def run(self) -> int:
        """Write the folder and print what it holds."""
        from lmkern.data import prepare
        from lmkern.jobs.demo import describe_data
        from lmkern.training.progress import ProgressLine

        settings = asdict(self)
        config = DataConfig(**{field.name: settings[field.name] for field in fields(DataConfig)})
        with ProgressLine() as line:
            manifest = prepare(config, self.out, overwrite=self.overwrite, progress=line.count)
        print(describe_data(manifest, self.out))
        return 0

    def kept(self) -> str:
        """What an interruption leaves."""
        return f"{self.out} is as it was"


def command(argv: Sequence[str]) -> Prepare:
    """The command line as a Prepare."""
    data = config_defaults(peek(argv, config=Path).config).get("data")
    return parse(Prepare, "prepare", argv, asdict(data) if data else None)
