"""Stopping between two steps: a flag that signals set, and the error that ends the command."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from moekit.config.errors import Interrupted


class Stop:
    """Set by SIGTERM or SIGINT while it listens; work looks at it where it can stop. A second SIGINT stops at once.

    >>> stop = Stop()
    >>> stop(), stop.name
    (False, 'a request')
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def name(self) -> str:
        """What it was set by."""
        return signal.Signals(self.signal).name if self.signal else "a request"

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals set it in here; outside they do what they did before."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread only
            return
        previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def interrupted(self, message: str) -> Interrupted:
        """The error that says what was kept; its exit code is that of the signal."""
        error = Interrupted(message)
        if self.signal == signal.SIGINT:
            error.exit_code = 130
        return error
