import os
import signal
import threading
from collections.abc import Iterator

import pytest

from lmkern.training.interruption import SIGNALS, Interruption


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Handlers of our own, which have to be back at the end."""

    def ours(number: int, frame: object) -> None:
        pytest.fail(f"signal {number} was not held back")

    before = {number: signal.signal(number, ours) for number in SIGNALS}
    yield
    found = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert found == dict.fromkeys(before, ours)


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_is_a_request(number: signal.Signals) -> None:
    with Interruption() as interruption:
        assert not interruption.requested
        os.kill(os.getpid(), number)
        assert interruption.requested


@pytest.mark.parametrize("first", SIGNALS)
def test_sigint_after_a_request_stops_at_once(first: signal.Signals) -> None:
    with Interruption() as interruption:
        os.kill(os.getpid(), first)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert interruption.requested


def test_sigterm_again_stays_a_request() -> None:
    with Interruption() as interruption:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.requested


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs hangups")
def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    ours = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interruption.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, ours)


def test_another_thread_leaves_the_handlers_alone() -> None:
    found = []

    def inside() -> None:
        with Interruption():
            found.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [before]
