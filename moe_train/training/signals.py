"""Ctrl-C and SIGTERM end a run after the step in progress, with a checkpoint. Of one process only, so far."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class Interruption:
    """The signal that asked for the end, once there is one."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextlib.contextmanager
    def noted(self, on: bool) -> Iterator[None]:
        """Within, a signal is noted instead of followed; a second one is followed at once."""
        if not on:
            yield
            return
        previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
