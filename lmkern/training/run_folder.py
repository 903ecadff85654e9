"""The folder of a run: what is in it, who may write to it, and what is written before the first step."""

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmkern.data import Dataset, PairDataset
from lmkern.data.shards import identity
from lmkern.files import write_json, write_text
from lmkern.machine import accelerator, processor, versions
from lmkern.training.checkpoint import list_checkpoints, remove_unfinished
from lmkern.training.config import RunConfig, config_differences, dump_config, load_config

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Of run.json, which stands for the whole folder.
FORMAT, VERSION = "lmkern-run", 1
CONFIG, ABOUT, METRICS = "config.toml", "run.json", "metrics.jsonl"
CHECKPOINTS, MODEL = "checkpoints", "model"
# Any of these says that the folder holds a run.
MARKS = (CONFIG, ABOUT, METRICS, CHECKPOINTS, MODEL)
# These may be there before it: the text that a demo prepares, and wall seconds by job.
DATA, TIMINGS = "data", "timings.json"
EVALUATION, SAMPLES, OUTPUTS = "evaluation.json", "samples.json", "outputs.txt"
PAGE, PAGE_MARKDOWN, CURVES = "report.html", "report.md", "curves.svg"
# What is made from a model and says nothing true of the next.
DERIVED = (EVALUATION, SAMPLES, OUTPUTS, PAGE, PAGE_MARKDOWN, CURVES)
# Where the seconds of the training go, in the order of a step.
PHASES = ("data", "forward", "backward", "optimizer", "validation", "checkpoint")
# Fields that may change on the way: nothing that is computed depends on them.
FREE = ("training.keep_checkpoints", "training.checkpoint_every", "training.threads")


def check_run_folder(config: RunConfig, folder: Path, *, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to go on from, None to start at the first step. Changes nothing.

    Raises FileExistsError for a folder that holds a run, unless resume or overwrite is asked for; with resume
    FileNotFoundError where there is no run, and ValueError for a configuration other than the run's.
    """
    if resume and overwrite:
        raise ValueError("train: resume and overwrite exclude each other; got both")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"train: expected a folder to write to; {folder} is a file; choose another")
    marks = [name for name in MARKS if (folder / name).exists()]
    # Without its configuration there is nothing to go on with.
    go_on = "--resume to go on with it, " if CONFIG in marks else ""
    if marks and not (resume or overwrite):
        raise FileExistsError(
            f"train: {folder} already holds a run ({', '.join(marks)}): pass {go_on}"
            "--overwrite to replace it, or choose another folder"
        )
    if not resume:
        return None
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"train: expected a run to resume; {folder / CONFIG} does not exist: "
            + ("pass --overwrite instead" if marks else "leave --resume out")
            + " to start one"
        )
    _check_same(load_config(folder / CONFIG), config, folder)
    return next(reversed(list_checkpoints(folder / CHECKPOINTS)), None)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder, made if need be, held against other processes that would write a run to it.

    The system lets go of it when this process ends, however it ends. FileExistsError where another holds it.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY) if fcntl is not None else None
    try:
        if descriptor is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FileExistsError(
                    f"train: another process is training in {folder}: let it end, stop it, or choose another "
                    "folder"
                ) from None
            except OSError:
                pass  # a file system without locks
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
        if made and not any(folder.iterdir()):
            folder.rmdir()


def open_run_folder(folder: Path, *, fresh: bool) -> None:
    """Make the folder ready to be written to. fresh: remove what an older run left in it."""
    if fresh:
        remove_derived(folder)
        for name in MARKS:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder / CHECKPOINTS)


def remove_derived(folder: Path) -> None:
    """Remove what was made from a model that is about to change: evaluation, samples and report."""
    for name in DERIVED:
        (folder / name).unlink(missing_ok=True)


def write_about(
    config: RunConfig, dataset: Dataset | PairDataset, folder: Path, resolved: dict[str, Any]
) -> None:
    """config.toml, as asked for, and run.json: data, command, versions and machine.

    resolved: what "auto" became (dtype, device, threads), and the measured ceiling.
    """
    about = {
        "format": FORMAT,
        "version": VERSION,
        **_about_data(dataset, folder),
        "command": sys.argv,
        "versions": versions(),
        "machine": {
            "system": platform.platform(),
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "accelerator": accelerator(),
        },
        "resolved": resolved,
    }
    write_text(folder / CONFIG, dump_config(config))
    write_json(folder / ABOUT, about)


def other_data(recorded: Mapping[str, Any], manifest: Mapping[str, Any]) -> str | None:
    """In words how the data differs from that of a checkpoint's state or a run.json; None if it does not."""
    corpus = manifest["corpus"]["sha256"]
    if recorded.get("corpus_sha256", corpus) != corpus:
        return f"expected a corpus with SHA-256 {recorded['corpus_sha256']}, got {corpus}"
    # Older ones have none.
    if "data_sha256" in recorded and recorded["data_sha256"] != identity(manifest):
        return "expected the same corpus prepared as it was, got it cut, split or tokenized otherwise"
    return None


def data_moved(dataset: Dataset | PairDataset, folder: Path) -> None:
    """Writes into run.json where the data lies now: a run that is resumed may find it elsewhere."""
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    write_json(folder / ABOUT, about | _about_data(dataset, folder))


def _about_data(dataset: Dataset | PairDataset, folder: Path) -> dict[str, str]:
    data = dataset.folder.resolve()
    inside = data.is_relative_to(folder.resolve())
    return {
        "data": str(data.relative_to(folder.resolve()) if inside else data),
        "corpus_sha256": dataset.manifest["corpus"]["sha256"],
        "data_sha256": identity(dataset.manifest),
    }


def _check_same(before: RunConfig, now: RunConfig, folder: Path) -> None:
    differing = {name: pair for name, pair in config_differences(before, now).items() if name not in FREE}
    if differing:
        listed = "; ".join(f"{name} was {old!r} and is now {new!r}" for name, (old, new) in differing.items())
        raise ValueError(
            f"train: to resume, the configuration must be that of the run in {folder}: {listed}. "
            "Put the fields back, or start another run in another folder"
        )
