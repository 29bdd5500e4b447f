"""Which signals ask for an end, and which ask for it at once."""

from __future__ import annotations

import os
import signal

import pytest

from moe_train.training import signals
from moe_train.training.signals import Interruption

TERM, INT = signal.SIGTERM, signal.SIGINT


def noted(*numbers: int) -> int | None:
    interruption = Interruption(alone=True)
    with interruption.noted():
        for number in numbers:
            os.kill(os.getpid(), number)
    return interruption.signal


@pytest.mark.parametrize("number", [TERM, INT])
def test_the_first_is_noted(number: int) -> None:
    assert noted(number) == number


@pytest.mark.parametrize("numbers", [(INT, INT), (TERM, INT), (INT, TERM)])
def test_a_second_one_is_followed_at_once(numbers: tuple[int, int]) -> None:
    with pytest.raises(KeyboardInterrupt):
        noted(*numbers)


def test_a_sigterm_that_is_passed_on_is_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert noted(TERM, TERM, TERM) == TERM
    monkeypatch.setattr(signals, "PASSED_ON_WITHIN", -1.0)
    with pytest.raises(KeyboardInterrupt):
        noted(TERM, TERM)
