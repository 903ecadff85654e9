import errno
import io

import pytest

from lmkern.training.progress import ProgressLine, Smoothed, readable_count, readable_seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_line_is_written_over_and_said_lines_stay() -> None:
    stream = Terminal()
    line = ProgressLine(stream=stream)
    line.update("a longer text", force=True)
    line.update("short", force=True)
    line.say("said")
    line.close()
    assert stream.getvalue() == "\ra longer text\x1b[K\rshort\x1b[K\nsaid\n"


def test_log_gets_whole_lines_and_not_every_one() -> None:
    stream = io.StringIO()
    line = ProgressLine(stream=stream)
    for i in range(1000):
        line.update(str(i))
    line.update("last", force=True)
    assert stream.getvalue() == "0\nlast\n"


class Gone(Terminal):
    """A terminal that was closed."""

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")


def test_a_terminal_that_is_gone_ends_the_showing_and_nothing_else() -> None:
    with ProgressLine(stream=Gone()) as line:
        line.update("1", force=True)
        line.say("2")
        assert not line.enabled


def test_stages_are_counted_with_and_without_a_total_and_the_line_is_ended() -> None:
    stream = Terminal()
    with ProgressLine(stream=stream) as line:
        line.count("read", 1200, None)
    with ProgressLine(stream=stream) as line:
        line.count("encode", 1, 2000)
    assert stream.getvalue() == "\rread: 1,200\x1b[K\n\rencode: 1 of 2,000\x1b[K\n"


def test_disabled_line_is_silent() -> None:
    stream = Terminal()
    line = ProgressLine(False, stream)
    line.update("x", force=True)
    line.say("y")
    line.close()
    assert stream.getvalue() == ""


def test_smoothed_mean_is_not_drawn_to_its_start() -> None:
    mean = Smoothed(0.9)
    assert mean.add(5.0) == pytest.approx(5.0)
    assert [mean.add(5.0) for _ in range(3)] == pytest.approx([5.0] * 3)
    assert 5.0 < mean.add(9.0) < 7.0


def test_numbers_read_well() -> None:
    assert [readable_seconds(s) for s in (0, 75, 4000)] == ["0:00", "1:15", "1:06:40"]
    assert [readable_count(n) for n in (950, 12345, 4.2e6, 3e9)] == ["950", "12.3k", "4.2M", "3.0G"]
