"""The verbs of `lmkern`, and what becomes of errors."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
from collections.abc import Sequence

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
    stderr and status 2; with LMKERN_TRACEBACK=1 in the environment it is raised. Ctrl-C is status 130.
    """
    verb, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("-h", "--help"):
        print(overview())
        return 0
    if verb == "--version":
        from lmkern import __version__

        print(f"lmkern {__version__}")
        return 0
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        return complain(
            f"no verb {verb!r}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}")
        )
    command = None
    try:
        command = importlib.import_module(f"lmkern.cli.{verb.replace('-', '_')}").command(rest)
        status = int(command.run())
        # Here, and not at the exit of Python, a reader that has gone can still be handled.
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(f"\nlmkern: interrupted; {command.kept() if command else 'nothing was begun'}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Without this the flush at the exit of Python would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        if os.environ.get("LMKERN_TRACEBACK") == "1" or not known(error):
            raise
        return complain(in_words(error, verb))


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
    if isinstance(error, OSError) and error.errno and error.filename:
        remedy = "make room there, or " if error.errno in FULL else ""
        return (
            f"{verb}: the system refuses {error.filename}: {str(error.strerror).lower()}; "
            f"{remedy}choose another path"
        )
    return str(error)


def complain(message: str) -> int:
    """One line on stderr; the status of a usage error."""
    print(f"lmkern: error: {' '.join(message.split())}", file=sys.stderr)
    return USAGE_ERROR


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
