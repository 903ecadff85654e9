"""The verbs of `lmkern`, and what becomes of errors."""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TextIO

# Module lmkern.cli.<verb> (with _ for -) has `command(argv)`; what it gives has `run() -> int`, the exit
# status, and `kept() -> str`, what an interruption leaves.
VERBS = {
    "demo": "text in, a judged and writing model and its report out, in one go",
    "prepare": "clean, split and tokenize text, or pairs of texts, into a data folder",
    "train": "train a model on a data folder, or go on with an interrupted run",
    "evaluate": "bits per byte on the test text, beside a 5-gram model and xz; of pairs, BLEU and chrF",
    "generate": "continue a prompt",
    "translate": "turn sources into targets, with a model of pairs",
    "report": "write the page of a run",
    "tune-kernels": "search the Triton kernels' tile sizes on this machine's GPU",
    "doctor": "what this machine can run, and why not the rest",
}
# What a disk says that takes no more: it is full, a share of it is, or a file may not grow.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
USAGE_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status.

    A known error (bad values, missing, existing or forbidden files, a backend that cannot run) is one line on
    stderr and status 2; with LMKERN_TRACEBACK=1 in the environment it is raised. Ctrl-C is status 130, and
    another signal that asks for the end 128 and its number.
    """
    verb, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    make_streams_usable()
    command = None
    try:
        with signals_interrupt():
            if verb in ("-h", "--help"):
                print(overview())
                status = 0
            elif verb == "--version":
                from lmkern import __version__

                print(f"lmkern {__version__}")
                status = 0
            elif verb not in VERBS:
                near = difflib.get_close_matches(verb, VERBS, n=1)
                remedy = f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"
                status = complain(f"no verb {verb!r}; {remedy}")
            else:
                command = importlib.import_module(f"lmkern.cli.{verb.replace('-', '_')}").command(rest)
                status = int(command.run())
    except SystemExit as stop:
        # The parser's, which has said what there is to say.
        status = int(stop.code or 0)
    except KeyboardInterrupt as error:
        tell(f"\nlmkern: interrupted; {command.kept() if command else 'nothing was begun'}")
        status = 128 + error.args[0] if error.args else INTERRUPTED
    except BrokenPipeError:
        status = BROKEN_PIPE
    except Exception as error:
        if os.environ.get("LMKERN_TRACEBACK") == "1" or not known(error):
            raise
        status = complain(in_words(error, verb))
    return flushed(status, verb)


def make_streams_usable() -> None:
    """Every standard stream is there, and takes whatever is printed.

    Python has None for one that is closed (>&-). What the encoding of a terminal or a file cannot say is
    written as an escape: no run shall end for the name of its folder.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """Inside `with`, SIGTERM and SIGHUP raise KeyboardInterrupt with their number; Ctrl-C does without.

    What was begun is cleared away. Those that are ignored (nohup), or that somebody else handles, stay so.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    # SIGHUP is none of Windows'; and signals belong to the main thread.
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def flushed(status: int, verb: str) -> int:
    """The exit status when all that was printed has been written, here and not at the exit of Python."""
    for stream in (sys.stdout, sys.stderr):
        if error := refusal(stream):
            # Without this Python would try once more, and complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if stream is sys.stdout and status == 0:
                broken = isinstance(error, BrokenPipeError)
                status = BROKEN_PIPE if broken else complain(in_words(error, verb))
    return status


def refusal(stream: TextIO) -> OSError | None:
    """What the system says to the rest of a stream's text; None where it takes it."""
    try:
        stream.flush()
    except OSError as error:
        error.filename = "standard output"
        return error
    return None


def known(error: Exception) -> bool:
    """Whether the error's message alone tells the user what to do."""
    from lmkern.kernels.backends import UnsupportedBackend

    return isinstance(error, ValueError | OSError | FloatingPointError | UnsupportedBackend)


def in_words(error: Exception, verb: str) -> str:
    """What to tell the user: the error's message, or for what the system forbade verb, path and remedy."""
    if isinstance(error, PermissionError) and error.filename:
        return (
            f"{verb}: expected to be allowed to read and write; the system refuses {error.filename}: "
            "change the mode or owner of it or its folder, or choose another path"
        )
    if isinstance(error, OSError) and error.filename is None:
        error = refusal(sys.stdout) or error
    if isinstance(error, OSError) and error.errno and error.filename:
        remedy = "make room there, or " if error.errno in FULL else ""
        return (
            f"{verb}: the system refuses {error.filename}: {str(error.strerror).lower()}; "
            f"{remedy}choose another path"
        )
    return str(error)


def complain(message: str) -> int:
    """One line on stderr; the status of a usage error."""
    tell(f"lmkern: error: {' '.join(message.split())}")
    return USAGE_ERROR


def tell(message: str) -> None:
    """A message on stderr, if somebody is still there to read it."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr)


def overview() -> str:
    """What `lmkern --help` prints."""
    verbs = "\n".join(f"  {verb:<14}{summary}" for verb, summary in VERBS.items())
    return (
        "usage: lmkern VERB [OPTIONS]\n\nFrom raw text to an evaluated, writing language model.\n\n"
        f"verbs:\n{verbs}\n\n"
        "example:\n  lmkern demo                      the documentation inside this Python, about 3 minutes\n"
        "  lmkern demo book.txt notes/      your own text\n"
        "  lmkern train --help              the options of a verb\n\n"
        "LMKERN_TRACEBACK=1 shows where an error came from."
    )
