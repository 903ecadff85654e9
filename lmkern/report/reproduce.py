"""The commands that make a run again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from lmkern.report.run import Run


def commands(run: Run) -> str:
    """Shell lines that repeat the run, the token budget written out.

    A demo is its own command with --tokens; it writes to a new folder. Any other run is `lmkern train` with
    the configuration and the data that the run folder names.
    """
    verb, options = split_command(run.about.get("command", ()))
    tokens = run.config.get("training", {}).get("tokens")
    if verb == "demo" and tokens is not None:
        return shlex.join(["lmkern", "demo", *without(options, "--out", "--tokens"), "--tokens", str(tokens)])
    config, again = run.folder / "config.toml", run.folder.with_name(f"{run.folder.name}-again")
    arguments = ["--config", str(config), "--data", str(run.data), "--out", str(again)]
    return shlex.join(["lmkern", "train", *arguments])


def split_command(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Verb and options of a recorded command line, however lmkern was started."""
    return (argv[1], list(argv[2:])) if len(argv) > 1 else ("", [])


def without(options: Sequence[str], *names: str) -> list[str]:
    """The options but for the named ones and their values (`--name value` or `--name=value`)."""
    kept: list[str] = []
    skip = False
    for option in options:
        if not skip and option.partition("=")[0] not in names:
            kept.append(option)
        skip = not skip and option in names
    return kept
