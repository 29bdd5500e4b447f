"""What several processes exchange: how seconds are told apart, how figures come together, what they cost."""

from __future__ import annotations

import pytest

from moe_train.cost.communication import KINDS, Exchanged, common, length, merged
from moe_train.cost.meter import Meter
from moe_train.cost.price import Price

PRICE = Price(basis="rental", usd_per_hour=3600.0, usd_per_kwh=None, source="made up", date=None)


def timed(exposed: float, hidden: float, seconds: float = 10.0, sent: float = 100.0) -> Exchanged:
    """A step in which gradients were summed, part of it while others were computed."""
    step = Exchanged.nothing()
    step.steps, step.sent["gradients"] = 1, sent
    under_way = (1.0, 1.0 + hidden + exposed)
    step.add_times({"gradients": [under_way]}, [(1.0 + hidden, 1.0 + hidden + exposed)], seconds)
    return step


def test_what_overlaps_counts_once() -> None:
    assert merged([(5, 6), (1, 3), (2, 4), (4, 4.5)]) == [(1, 4.5), (5, 6)]
    assert common([(0, 2), (3, 5)], [(1, 4), (4.5, 9)]) == [(1, 2), (3, 4), (4.5, 5)]
    assert length([(1, 4.5), (5, 6)]) == 4.5
    assert common([], [(1, 2)]) == []


def test_what_a_step_stood_still_for_is_exposed_and_the_rest_hidden() -> None:
    step = Exchanged.nothing()
    step.steps = 1
    step.add_times({"weights": [(0, 2)], "gradients": [(1, 4), (3, 6)]}, [(1.5, 2), (5, 7)], seconds=8.0)
    assert (step.exposed["weights"], step.hidden["weights"]) == (0.5, 1.5)
    assert (step.exposed["gradients"], step.hidden["gradients"]) == (1.5, 3.5)
    assert step.waited_seconds == 1.5  # both kinds were waited for until 2, and nothing was under way after 6
    assert step.exposed_fraction == 1.5 / 8


def test_figures_are_means_over_processes_and_steps() -> None:
    one, other = timed(exposed=1.0, hidden=3.0), timed(exposed=3.0, hidden=1.0, sent=300.0)
    mean = Exchanged.of([a + b for a, b in zip(one.numbers(), other.numbers(), strict=True)], processes=2)
    untimed = Exchanged.nothing()
    untimed.steps, untimed.sent["gradients"] = 3, 600.0
    metrics = (mean + untimed).metrics()
    assert metrics == {
        "comm/bytes": (200 + 600) / 4,
        "comm/exposed_seconds": 2.0,
        "comm/exposed_fraction": 0.2,
        "comm/gradients/bytes": 200.0,
        "comm/gradients/exposed_seconds": 2.0,
        "comm/gradients/hidden_seconds": 2.0,
    }
    assert set(one.sent) == set(KINDS)


def test_nothing_timed_is_not_known() -> None:
    untimed = Exchanged.nothing()
    assert untimed.metrics() == {"comm/bytes": None, "comm/exposed_seconds": None, "comm/exposed_fraction": None}
    untimed.steps, untimed.sent["weights"] = 2, 10.0
    assert untimed.metrics()["comm/bytes"] == 5.0
    assert untimed.metrics()["comm/weights/exposed_seconds"] is None


def test_dollars_are_the_part_of_training_for_which_steps_waited() -> None:
    now = 0.0
    meter = Meter(price=PRICE, num_devices=2, clock=lambda: now)
    assert meter.usd_communication is None
    for exchanged in (timed(exposed=1.0, hidden=0.0), Exchanged.nothing()):  # the second step is not timed
        with meter.training():
            now += 10.0
        meter.exchange(exchanged)
        row = meter.window()
    assert meter.usd_train == pytest.approx(40.0)
    assert row["cost/usd_communication"] == meter.usd_communication == pytest.approx(0.1 * 40.0)

    resumed = Meter(price=PRICE, num_devices=2, clock=lambda: now)
    resumed.load_state_dict(meter.state_dict())
    resumed.exchange(Exchanged.nothing())
    assert resumed.usd_communication == pytest.approx(4.0)


def test_one_process_has_no_such_figures() -> None:
    meter = Meter(price=PRICE, num_devices=1)
    assert not any(name.startswith("comm/") or "communication" in name for name in meter.window())
