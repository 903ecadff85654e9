"""Verbs, help, errors in one line, and exit statuses."""

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lmkern.cli.report
from lmkern.cli.main import BROKEN_PIPE, INTERRUPTED, USAGE_ERROR, VERBS, main
from lmkern.files import replacing_folder
from lmkern.kernels.backends import UnsupportedBackend


def exit_status(argv: list[str]) -> int:
    """main's status, whether returned or raised by the parser."""
    try:
        return main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


def failing(error: BaseException) -> Any:
    """A command that raises."""

    def run() -> int:
        raise error

    return lambda argv: SimpleNamespace(run=run, kept=lambda: "all is kept")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"usage: lmkern {verb}" in shown
    assert f"example:\n  lmkern {verb}" in shown


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_overview_lists_every_verb(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert [verb for verb in VERBS if f"\n  {verb} " not in shown] == []


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lmkern 0.")


@pytest.mark.parametrize(
    ("verb", "words"), [("trian", "did you mean train?"), ("xyz", "there are demo, prepare")]
)
def test_unknown_verb_gets_the_nearest(verb: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb]) == USAGE_ERROR
    assert words in capsys.readouterr().err


def test_unknown_field_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["demo", "--model.layrs", "3"]) == USAGE_ERROR
    shown = capsys.readouterr().err
    assert "--model.layrs" in shown
    assert "--model.layers" in shown


@pytest.mark.parametrize(
    "error",
    [
        ValueError("what:\n  is wrong"),
        FileNotFoundError("what: is wrong"),
        FileExistsError("what: is wrong"),
        FloatingPointError("what: is wrong"),
        UnsupportedBackend("what: is wrong"),
    ],
)
def test_known_errors_are_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LMKERN_TRACEBACK", raising=False)
    monkeypatch.setattr(lmkern.cli.report, "command", failing(error))
    assert main(["report"]) == USAGE_ERROR
    assert capsys.readouterr().err == "lmkern: error: what: is wrong\n"


def test_what_the_system_forbids_is_one_line_with_the_path_and_a_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LMKERN_TRACEBACK", raising=False)
    error = PermissionError(errno.EACCES, "Permission denied", "notes/diary.txt")
    monkeypatch.setattr(lmkern.cli.report, "command", failing(error))
    assert main(["report"]) == USAGE_ERROR
    assert capsys.readouterr().err == (
        "lmkern: error: report: expected to be allowed to read and write; the system refuses "
        "notes/diary.txt: change the mode or owner of it or its folder, or choose another path\n"
    )


def test_any_other_refusal_of_the_system_is_a_line_with_the_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LMKERN_TRACEBACK", raising=False)
    error = OSError(errno.ENAMETOOLONG, "File name too long", "notes/xxx")
    monkeypatch.setattr(lmkern.cli.report, "command", failing(error))
    assert main(["report"]) == USAGE_ERROR
    assert capsys.readouterr().err == (
        "lmkern: error: report: the system refuses notes/xxx: file name too long; choose another path\n"
    )


def test_a_full_disk_is_a_line_that_asks_for_room(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LMKERN_TRACEBACK", raising=False)
    error = OSError(errno.ENOSPC, "No space left on device", "runs/mine/model")
    monkeypatch.setattr(lmkern.cli.report, "command", failing(error))
    assert main(["report"]) == USAGE_ERROR
    assert capsys.readouterr().err == (
        "lmkern: error: report: the system refuses runs/mine/model: no space left on device; "
        "make room there, or choose another path\n"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_text_that_may_not_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "diary.txt").write_text("secret")
    (tmp_path / "diary.txt").chmod(0)
    assert main(["prepare", str(tmp_path / "diary.txt"), "--out", str(tmp_path / "data")]) == USAGE_ERROR
    assert (
        f"prepare: expected to be allowed to read and write; the system refuses {tmp_path / 'diary.txt'}"
        in (capsys.readouterr().err)
    )


def test_traceback_comes_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMKERN_TRACEBACK", "1")
    monkeypatch.setattr(lmkern.cli.report, "command", failing(ValueError("wrong")))
    with pytest.raises(ValueError, match="wrong"):
        main(["report"])


def test_unknown_errors_are_never_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmkern.cli.report, "command", failing(TypeError("a defect of lmkern")))
    with pytest.raises(TypeError):
        main(["report"])


def test_interruption_says_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lmkern.cli.report, "command", failing(KeyboardInterrupt()))
    assert main(["report"]) == INTERRUPTED
    assert capsys.readouterr().err == "\nlmkern: interrupted; all is kept\n"


def test_module_runs_and_a_missing_folder_is_one_line_in_a_real_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lmkern", "report", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == USAGE_ERROR
    assert done.stdout == ""
    assert done.stderr.startswith("lmkern: error: run: ")
    assert done.stderr.count("\n") == 1


def run_into(output: Any, *argv: str) -> subprocess.CompletedProcess[bytes]:
    """A real process that writes to the output."""
    # Buffered, as it is by default: only then does the exit of Python flush what could not be written.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "lmkern", *argv]
    return subprocess.run(
        command, stdout=output, stderr=subprocess.PIPE, env=environment, timeout=120, check=False
    )


@pytest.mark.parametrize("argv", [("doctor",), ("--help",), ("report", "--help")])
def test_reader_that_goes_away_is_no_error(argv: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = run_into(write, *argv)
    os.close(write)
    assert (done.returncode, done.stderr) == (BROKEN_PIPE, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_an_output_that_takes_no_more_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = run_into(full, "--version")
    assert done.returncode == USAGE_ERROR
    assert done.stderr.decode() == (
        "lmkern: error: --version: the system refuses standard output: no space left on device; "
        "make room there, or choose another path\n"
    )


def test_a_refusal_while_a_verb_prints_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def fileno(self) -> int:
            return spare

    spare = os.open(os.devnull, os.O_WRONLY)
    try:
        monkeypatch.delenv("LMKERN_TRACEBACK", raising=False)
        monkeypatch.setattr(sys, "stdout", Full())
        error = OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(lmkern.cli.report, "command", failing(error))
        assert main(["report"]) == USAGE_ERROR
    finally:
        os.close(spare)
    shown = capsys.readouterr().err
    assert shown.startswith("lmkern: error: report: the system refuses standard output: no space left")
    assert shown.count("\n") == 1


def test_closed_streams_are_empty_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert main(["--version"]) == 0
    assert main(["xyz"]) == USAGE_ERROR
    assert sys.stdin.read() == ""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()


def test_what_an_encoding_cannot_say_is_written_as_an_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(
        lmkern.cli.report, "command", lambda argv: SimpleNamespace(run=lambda: print("läuf\udcff") or 0)
    )
    assert main(["report"]) == 0
    assert written.getvalue() == b"l\\xe4uf\\udcff\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_asks_for_the_end_leaves_nothing_behind(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not hasattr(signal, name):
        pytest.skip(f"no {name} here")
    number = getattr(signal, name)

    def run() -> int:
        with replacing_folder(tmp_path / "data"):
            os.kill(os.getpid(), number)
            pytest.fail("went on")

    command = SimpleNamespace(run=run, kept=lambda: "all is kept")
    monkeypatch.setattr(lmkern.cli.report, "command", lambda argv: command)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        assert main(["report"]) == 128 + number
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert capsys.readouterr().err == "\nlmkern: interrupted; all is kept\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs hangups")
def test_a_hangup_that_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    command = SimpleNamespace(run=lambda: os.kill(os.getpid(), signal.SIGHUP) or 0)
    monkeypatch.setattr(lmkern.cli.report, "command", lambda argv: command)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main(["report"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
