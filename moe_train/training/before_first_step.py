"""SIGTERM and Ctrl-C before a run's first step end it with a line that says so, and leave nothing half made.

    imports              at once, in the signal's handler: there is nothing to clear away
    data, folder, model  by an exception, so that what is being made is taken away by whoever makes it
    from then on         signals.py: after a step, with a checkpoint

Python's handlers wait until native code returns, where a process may be waiting for others that never come. So a thread
hears of the signal too and ends a process that has not ended by itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import Any

from moe_train.errors import BeforeFirstStep, say

PATIENCE_SECONDS = 8.0  # to clear away; launchers and schedulers have about thirty

_before: dict[int, Any] = {}  # what the signals did before
_unwinds = False
_holding = False
_asked: int | None = None  # the signal that came
_wake: tuple[int, int] | None = None  # a pipe that the interpreter writes a signal's number to at once


def take_signals() -> None:
    """As the first thing that a run's process does. Signals that somebody has taken already, or ignores, stay so."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            _before[number] = signal.signal(number, _come)
    os.register_at_fork(after_in_child=_in_a_child)


def unwind() -> None:
    """From now on there may be something to clear away."""
    global _unwinds, _wake
    if not _before:
        return
    _unwinds = True
    _wake = os.pipe()
    os.set_blocking(_wake[1], False)
    signal.set_wakeup_fd(_wake[1], warn_on_full_buffer=False)
    threading.Thread(target=_lose_patience, args=(_wake[0],), daemon=True).start()


def hold() -> None:
    """A signal that comes from now on is followed by `release`."""
    global _holding
    _holding = True


def release() -> None:
    global _holding
    _holding = False
    if _asked is not None and _unwinds:
        raise BeforeFirstStep(_asked)


def asked(saved_step: int | None = None) -> BeforeFirstStep | None:
    """The end that a signal has asked for, if one has; further ones are ignored from here on."""
    if not _unwinds:
        return None
    hold()
    time.sleep(0)  # one that waits for its handler
    return None if _asked is None else BeforeFirstStep(_asked, saved_step)


def hand_over() -> dict[int, Any]:
    """The signals are somebody else's from now on; returns what they did before. Raises where one was swallowed."""
    global _unwinds, _wake
    if _unwinds and _asked is not None:
        raise BeforeFirstStep(_asked)
    taken = dict(_before)
    _before.clear()
    _unwinds = False
    if _wake is not None:
        signal.set_wakeup_fd(-1)
        os.close(_wake[1])  # where the thread reads to the end
        _wake = None
    return taken


def _in_a_child() -> None:
    global _asked
    _asked = None
    for number, handler in hand_over().items():
        signal.signal(number, handler)


def _come(number: int, _frame: object) -> None:
    global _asked
    first, _asked = _asked is None, _asked or number
    if not _unwinds:
        _end(number)
    if first and not _holding:
        raise BeforeFirstStep(number)


def _lose_patience(pipe: int) -> None:
    while came := os.read(pipe, 1):
        if came[0] in _before:
            time.sleep(PATIENCE_SECONDS)
            if _unwinds:
                _end(came[0])
    os.close(pipe)


def _end(number: int) -> None:
    end = BeforeFirstStep(number)
    with contextlib.suppress(OSError, ValueError):
        say(str(end))
    os._exit(end.exit_status)
