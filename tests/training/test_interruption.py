import os
import signal
import threading
from collections.abc import Iterator

import pytest

from lmkern.training.interruption import Interruption


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Handlers of our own, which have to be back at the end."""

    def ours(number: int, frame: object) -> None:
        pytest.fail(f"signal {number} was not held back")

    before = {number: signal.signal(number, ours) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    found = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert found == dict.fromkeys(before, ours)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_a_request(number: signal.Signals) -> None:
    with Interruption() as interruption:
        assert not interruption.requested
        os.kill(os.getpid(), number)
        assert interruption.requested


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
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
