"""Medians, quartiles and paired ratios on made-up numbers, and arms that take turns."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_train.benchmark import timing
from moe_train.benchmark.figures import Figure, doubts, estimate, marked, measured, not_measured, paired
from moe_train.benchmark.timing import interleaved, seconds_a_call

CPU = torch.device("cpu")


def test_an_estimate_is_the_median_and_the_quartiles() -> None:
    assert estimate([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0, 4.0, 5)
    assert estimate([7.0]) == (7.0, 7.0, 7.0, 1)


def test_a_round_in_which_everything_is_slow_does_not_move_a_paired_ratio() -> None:
    a, b = [2.0, 20.0, 2.0, 200.0], [1.0, 10.0, 1.0, 100.0]
    assert paired(a, b) == (2.0, 2.0, 2.0, 4)
    assert paired([1.0, 2.0, 3.0], [1.0, 1.0, 1.0], scale=10.0).value == 20.0


@given(st.lists(st.floats(0.01, 100), min_size=3, max_size=9), st.floats(0.1, 10))
def test_a_constant_ratio_comes_out_whatever_the_rounds_were_like(rounds: list[float], ratio: float) -> None:
    found = paired([ratio * each for each in rounds], rounds)
    assert found.value == pytest.approx(ratio)
    assert found.high - found.low == pytest.approx(0, abs=1e-9)


def test_arms_of_different_numbers_of_rounds_are_not_paired() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired([1.0], [1.0, 2.0])


def test_what_was_not_measured_has_a_reason_and_no_value() -> None:
    figure = not_measured("tax", "moe_tax", "ratio", "no such device")
    assert (figure.value, figure.spread, figure.note) == (None, None, "no such device")
    assert measured("tax", "moe_tax", estimate([1.0, 2.0, 3.0]), "ratio").spread == (1.5, 2.5)


def test_arms_take_turns_and_each_round_begins_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    arms = {name: lambda name=name: calls.append(name) for name in "abc"}
    monkeypatch.setattr(timing, "seconds_a_call", lambda run, device, calls=1: run() or 1.0)
    seconds = interleaved(arms, CPU, rounds=4)
    assert "".join(calls) == "aabbcc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(found) for name, found in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_spent_budget_leaves_three_rounds() -> None:
    seconds = interleaved({"a": lambda: None}, CPU, rounds=50, budget_seconds=0.0)
    assert len(seconds["a"]) == 3


def test_a_short_call_is_repeated_until_it_fills_the_time_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def record(run: timing.Call, device: torch.device, calls: int = 1) -> float:
        asked.append(calls)
        return 0.01

    monkeypatch.setattr(timing, "seconds_a_call", record)
    interleaved({"a": lambda: None}, CPU, rounds=3, shortest_seconds=0.055)
    assert asked == [1, 6, 6, 6]


def test_the_time_of_a_call_is_the_mean_of_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 16.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert seconds_a_call(lambda: None, CPU, calls=3) == 2.0


@pytest.mark.parametrize(
    ("name", "value", "quartiles", "reason"),
    [
        ("moe_tax", 1.2, (1.1, 1.3), None),
        ("moe_tax", 1.2, (1.0, 1.3), "quartiles are 25% of it apart"),
        ("utilization_of_measured_peak", 0.1, (0.06, 0.15), "quartiles are 90% of it apart"),
        ("optimizer_fraction", 0.03, (0.01, 0.07), None),  # what is left is 0.97, give or take 0.03
        ("experts_8_to_256_slowdown", 0.6, (0.4, 0.6), "quartiles are 33% of it apart"),
    ],
)
def test_a_figure_is_unsteady_where_its_quartiles_are_more_than_a_fifth_apart(
    name: str, value: float, quartiles: tuple[float, float], reason: str | None
) -> None:
    assert marked(Figure("suite", name, value, "", spread=quartiles), None).unsteady == reason


def test_what_is_counted_is_steady_on_any_device() -> None:
    counted = Figure("step", "host_synchronizations", 0.0, "count")
    assert marked(counted, "the device was slower").unsteady is None


def test_what_speaks_against_many_figures_is_a_short_line() -> None:
    wide = [marked(Figure("tax", f"rate_{n}", 1.0, "ratio", spread=(0.5, 1.0 + n)), None) for n in range(4)]
    slowed = marked(Figure("tax", "speed", 1.0, "ratio", spread=(1.0, 1.0)), "the device multiplied slower")
    assert doubts(wide[:1]) == "rate_0: quartiles are 50% of it apart"
    assert doubts([*wide, slowed]) == (
        "rate_0, rate_1 and 2 more: quartiles are more than a fifth apart; speed: the device multiplied slower"
    )
