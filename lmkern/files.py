"""Files that survive a power cut (written aside, flushed to the disk, then renamed), and their checksums."""

import contextlib
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

# Seconds.
_DAY = 86_400.0


def checksum(path: Path) -> dict[str, Any]:
    """{"bytes": size, "sha256": hexadecimal}."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def damage(path: Path, expected: Mapping[str, Any]) -> str | None:
    """In words how the file differs from its checksum; None where it is as it should be."""
    found = checksum(path)
    if found == expected:
        return None
    kind = "altered" if found["bytes"] == expected["bytes"] else "truncated or altered"
    return (
        f"{path} is {kind}: expected {expected['bytes']} bytes with SHA-256 {expected['sha256']}, "
        f"got {found['bytes']} bytes with SHA-256 {found['sha256']}"
    )


def save_tensors(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """safetensors' save_file, whose files only their owner may read; with the mode that other files have.

    Raises OSError, naming the path, where the system refuses (a full disk): safetensors' own error is none.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):
            code = int(found[1])
            raise OSError(code, os.strerror(code), str(path)) from None
        raise
    path.chmod(mode)


def flush_to_disk(path: Path) -> None:
    """Wait until the file's bytes, or the folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def known_as(names: Mapping[Path, Path]) -> Iterator[None]:
    """An error of the system names the second of two paths, which the user knows, in place of the first.

    One that names none, as of a write to a full disk, names the path, or the folder of several.
    """
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = os.path.commonpath(names.values())
        for ours, theirs in names.items():
            if str(error.filename).startswith(str(ours)):
                error.filename = str(theirs) + str(error.filename).removeprefix(str(ours))
        raise


def _aside(path: Path) -> Path:
    """A path beside this one to write to, which no other thread, process or machine takes.

    Those that processes of this machine did not live to clear away go after a day: containers share its name
    and not its processes.
    """
    machine = f".{path.name}.{platform.node()}."
    for left in path.parent.glob(".*.part"):
        found = re.fullmatch(re.escape(machine) + r"(\d+)\.[0-9a-f]{8}\.part", left.name)
        if not found or _alive(int(found[1])):
            continue
        with contextlib.suppress(FileNotFoundError):  # another process clears away too
            if time.time() - left.stat().st_mtime > _DAY:
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
    return path.with_name(f"{machine}{os.getpid()}.{secrets.token_hex(4)}.part")


def _alive(process: int) -> bool:
    """Whether a process of this machine has that id."""
    if os.name != "posix":
        return True  # elsewhere signal 0 is no question
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    return True


@contextlib.contextmanager
def replacing(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Paths to write instead of `paths`, in folders that exist.

    At the end all are flushed, and then take their places in the order given: a reader, or a crash, meets a
    file's old content or its new, never a part of it. If anything goes wrong before, none of them does, and
    nothing is left behind.
    """
    parts = tuple(map(_aside, paths))
    with known_as(dict(zip(parts, paths, strict=True))):
        try:
            yield parts
            for part in parts:
                flush_to_disk(part)
            for part, path in zip(parts, paths, strict=True):
                part.replace(path)
            for folder in {path.parent for path in paths}:
                flush_to_disk(folder)
        finally:
            for part in parts:
                part.unlink(missing_ok=True)


def check_place(folder: Path) -> None:
    """OSError, naming the folder, where `replacing_folder` could not begin."""
    above = next(path for path in folder.parents if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=above):
            pass
    except OSError as error:
        error.filename = str(folder)
        raise


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside this one that takes its place at the end, or disappears if anything goes wrong.

    The folders above it are made if need be; it holds files only.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = _aside(folder)
    old = part.with_suffix(".old")
    try:
        with known_as({part: folder}):
            part.mkdir()
            yield part
            for path in (*part.iterdir(), part):
                flush_to_disk(path)
            if folder.exists():
                folder.rename(old)
            try:
                part.rename(folder)
            except OSError:
                if old.exists():
                    old.rename(folder)
                raise
            flush_to_disk(folder.parent)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to the path, whole or not at all.

    The bytes of a path that are no text (lone surrogates in Python) are written as escapes: JSON's own.
    """
    with replacing(path) as (part,):
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write the value as readable JSON to the path, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
