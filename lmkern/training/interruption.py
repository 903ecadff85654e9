"""SIGINT, SIGTERM and SIGHUP as a polite request."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

# SIGHUP, which Windows has not: the terminal has gone.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interruption:
    """Inside `with`, the first SIGINT, SIGTERM or SIGHUP sets `requested`.

    A SIGINT after it raises KeyboardInterrupt at once. A SIGHUP that is ignored stays so (nohup). At the end
    the handlers before it come back. Signals belong to the main thread: in another one this does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            heard = (number for number in SIGNALS if not _is_nohup(number))
            self._before = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # None: a handler that was not installed from Python and that Python cannot put back.
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


def _is_nohup(number: signal.Signals) -> bool:
    """Whether this is SIGHUP, and whoever started the process had it ignored."""
    return number.name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN
