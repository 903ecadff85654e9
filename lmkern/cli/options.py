"""Command lines into frozen dataclasses, with defaults from a TOML file where one is named."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import tyro

T = TypeVar("T")


def parse(kind: type[T], verb: str, argv: Sequence[str], defaults: Mapping[str, Any] | None = None) -> T:
    """The command line as a `kind`; its docstring, example and all, is the help.

    defaults: field -> value, in place of the dataclass' own. Exits with status 2 for what does not parse
    (naming the nearest options) and 0 after --help.
    """
    given = dict(defaults or {})
    required = {field.name for field in fields(kind) if field.default is field.default_factory is MISSING}  # type: ignore[arg-type]
    missing: Any = tyro.MISSING
    return tyro.cli(
        kind,
        prog=f"lmkern {verb}",
        description=inspect.getdoc(kind),
        args=list(argv),
        default=kind(**dict.fromkeys(required, missing) | given),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def peek(argv: Sequence[str], **options: Callable[[str], Any] | bool) -> argparse.Namespace:
    """The named options of a command line, before it is parsed: those that decide the defaults of the others.

    A value is the option's type, or False for a flag. An option that is absent is None.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, kind in options.items():
        if kind is False:
            parser.add_argument(f"--{name}", action="store_true")
        else:
            parser.add_argument(f"--{name}", type=kind)  # type: ignore[arg-type]
    try:
        return parser.parse_known_args(list(argv))[0]
    except argparse.ArgumentError:
        # What is wrong with it, the real parser says better.
        return argparse.Namespace(**dict.fromkeys(options))


def config_defaults(path: Path | None, vocab_size: int | None = None) -> dict[str, Any]:
    """data, model and training of a TOML file, as `load_config` reads it; nothing without one."""
    if path is None:
        return {}
    from lmkern.training import load_config

    config = load_config(path, vocab_size=vocab_size)
    return {field.name: getattr(config, field.name) for field in fields(config)}
