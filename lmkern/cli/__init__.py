"""The `lmkern` command: parse, call, print."""

from lmkern.cli.main import main

__all__ = ["main"]
