"""A run that a clock ends is no more than a step ahead of its GPU."""

from __future__ import annotations

import pytest
import torch

from moe_train.training.pace import OneStepAhead, pace_of


def test_every_step_waits_for_the_one_before_it_once_it_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class Event:
        made = 0

        def __init__(self) -> None:
            Event.made += 1
            self.name = Event.made

        def record(self) -> None:
            happened.append(f"{self.name} queued")

        def synchronize(self) -> None:
            happened.append(f"{self.name} done")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    pace = OneStepAhead()
    for _ in range(3):
        pace.follow()
    assert happened == ["1 queued", "2 queued", "1 done", "3 queued", "2 done"]


def test_only_a_clock_needs_it_and_only_a_gpu() -> None:
    assert pace_of("cuda", uses_clock=True) is not None
    assert pace_of("cuda", uses_clock=False) is None
    assert pace_of("cpu", uses_clock=True) is None
