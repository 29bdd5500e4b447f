"""The arithmetic of the two clocks and two costs, on a clock that the test turns."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.cost.meter import Meter, Work, process_start_seconds_ago
from moe_train.cost.price import Price

SECONDS = st.floats(0, 1e5)
# (seconds outside training, seconds of a step, tokens of the step)
STEPS = st.lists(st.tuples(SECONDS, SECONDS, st.integers(0, 10**7)), max_size=20)


class Clock:
    def __init__(self) -> None:
        self.now = 1234.5

    def __call__(self) -> float:
        return self.now


def meter(clock: Clock, **changes: object) -> Meter:
    settings = {"price": rented(3.6), "num_devices": 2, "work": WORK, "clock": clock}
    return Meter(**(settings | changes))


def rented(usd_per_hour: float | None) -> Price:
    return Price("rental", usd_per_hour, None, "a list", "2026-11")


WORK = Work(flops=1e9, recomputed_flops=0.25e9, ideal_seconds=1e-3, peak_tflops=0.5)
OWNED = Price("owned", 1.8, 0.36, "bought", "2026-11")


def step(run: Meter, clock: Clock, seconds: float, tokens: int) -> None:
    with run.training():
        clock.now += seconds
        run.add_tokens(tokens)


@given(STEPS, st.floats(0, 1e3), st.integers(1, 64), SECONDS, SECONDS)
def test_dollars_are_price_times_devices_times_hours(
    steps: list[tuple[float, float, int]], price: float, devices: int, already: float, earlier: float
) -> None:
    clock = Clock()
    run = meter(
        clock,
        price=rented(price),
        num_devices=devices,
        already_elapsed=already,
        earlier_wall_seconds=earlier,
        earlier_usd=price * devices * earlier / 3600,
    )
    for outside, inside, tokens in steps:
        clock.now += outside
        step(run, clock, inside, tokens)
    train = sum(inside for _, inside, _ in steps)
    wall = earlier + already + train + sum(outside for outside, _, _ in steps)
    assert run.train_seconds == pytest.approx(train, abs=1e-6)
    assert run.wall_seconds == pytest.approx(wall, abs=1e-6)
    assert run.usd_train == pytest.approx(price * devices * run.train_seconds / 3600, rel=1e-9, abs=1e-9)
    assert run.usd_total == pytest.approx(price * devices * run.wall_seconds / 3600, rel=1e-9, abs=1e-9)
    tokens = sum(count for _, _, count in steps)
    assert run.tokens == tokens
    assert run.flops == pytest.approx(tokens * 1e9)
    if tokens:
        assert run.usd_per_million_tokens == pytest.approx(run.usd_train * 1e6 / tokens)
        assert run.usd_per_million_tokens_all_in == pytest.approx(run.usd_total * 1e6 / tokens)


def test_throughput_and_utilization_come_from_the_train_clock() -> None:
    clock = Clock()
    run = meter(clock, already_elapsed=30.0)
    step(run, clock, 2.0, 1000)
    clock.now += 100  # an evaluation
    assert run.tokens_per_second == pytest.approx(500)
    assert run.model_flops_utilization == pytest.approx(1000 * 1e9 / (2.0 * 2 * 0.5e12))
    assert run.hardware_flops_utilization == pytest.approx(1.25 * run.model_flops_utilization)
    assert run.mixed_precision_utilization == pytest.approx(1000 * 1e-3 / (2.0 * 2))


def test_a_step_counts_even_if_it_fails() -> None:
    clock = Clock()
    run = meter(clock)
    with contextlib.suppress(RuntimeError), run.training():
        clock.now += 3
        raise RuntimeError
    step(run, clock, 2, 10)
    assert run.train_seconds == pytest.approx(5)


def test_nested_steps_are_counted_once() -> None:
    clock = Clock()
    run = meter(clock)
    with run.training():
        clock.now += 1
        with run.training():
            clock.now += 2
        clock.now += 4
    assert run.train_seconds == pytest.approx(7)
    assert run.window()["throughput/step_seconds"] == pytest.approx(7)


def test_without_a_price_every_cost_is_absent_and_the_rest_is_there() -> None:
    clock = Clock()
    run = meter(clock, price=rented(None))
    step(run, clock, 2.0, 1000)
    costs = (run.usd_train, run.usd_total, run.usd_per_million_tokens, run.usd_per_million_tokens_all_in)
    window = run.window()
    assert [*costs, *(value for name, value in window.items() if name.startswith("cost/"))] == [None] * 7
    assert window["throughput/tokens_per_second"] == pytest.approx(500)


def test_a_price_of_zero_costs_nothing() -> None:
    clock = Clock()
    run = meter(clock, price=rented(0.0))
    step(run, clock, 2.0, 1000)
    assert (run.usd_total, run.usd_per_million_tokens) == (0, 0)


def test_utilization_is_that_of_every_attempt_in_its_own_formats_and_on_its_own_devices() -> None:
    clock = Clock()
    first = meter(clock)  # two devices
    step(first, clock, 2.0, 1000)
    narrow = dataclasses.replace(WORK, peak_tflops=2.0, ideal_seconds=0.25e-3)
    second = meter(clock, num_devices=1, work=narrow)
    second.load_state_dict(first.state_dict())
    assert second.model_flops_utilization == first.model_flops_utilization
    assert second.mixed_precision_utilization == first.mixed_precision_utilization
    step(second, clock, 3.0, 500)
    attainable = 2.0 * 2 * 0.5e12 + 3.0 * 2e12
    assert second.model_flops_utilization == pytest.approx(1500 * 1e9 / attainable)
    assert second.hardware_flops_utilization == pytest.approx(1.25 * 1500 * 1e9 / attainable)
    assert second.mixed_precision_utilization == pytest.approx((1000 * 1e-3 + 500 * 0.25e-3) / (2.0 * 2 + 3.0))


def test_an_ideal_time_that_was_not_known_once_is_not_known_later() -> None:
    clock = Clock()
    first = meter(clock, work=dataclasses.replace(WORK, ideal_seconds=None))
    step(first, clock, 2.0, 1000)
    second = meter(clock)
    second.load_state_dict(first.state_dict())
    step(second, clock, 2.0, 1000)
    assert second.mixed_precision_utilization is None
    assert second.model_flops_utilization == pytest.approx(2000 * 1e9 / (4.0 * 2 * 0.5e12))


def test_without_a_peak_utilization_is_absent() -> None:
    clock = Clock()
    run = meter(clock, work=dataclasses.replace(WORK, peak_tflops=None, ideal_seconds=None))
    step(run, clock, 2.0, 1000)
    assert run.model_flops_utilization is run.hardware_flops_utilization is run.mixed_precision_utilization is None
    assert run.window()["throughput/model_flops_utilization"] is None


def test_before_the_first_token_rates_are_absent() -> None:
    run = meter(Clock())
    assert run.tokens_per_second is run.model_flops_utilization is run.usd_per_million_tokens is None
    window = run.window()
    assert {value for name, value in window.items() if name.startswith("throughput/")} == {None}
    assert window["progress/tokens"] == 0


def test_a_window_has_the_throughput_of_its_own_steps_and_the_costs_of_all() -> None:
    clock = Clock()
    run = meter(clock)
    step(run, clock, 100.0, 10)
    run.data_wait(50.0)
    run.window()
    step(run, clock, 1.0, 300)
    clock.now += 1000  # an evaluation
    step(run, clock, 3.0, 500)
    run.data_wait(0.2)
    run.data_wait(0.2)
    assert run.window() == pytest.approx(
        {
            "throughput/tokens_per_second": 200.0,
            "throughput/tokens_per_second_per_device": 100.0,
            "throughput/model_flops_utilization": 800 * 1e9 / (4 * 2 * 0.5e12),
            "throughput/step_seconds": 2.0,
            "throughput/data_wait_fraction": 0.1,
            "cost/usd_train": 3.6 * 2 * 104 / 3600,
            "cost/usd_total": 3.6 * 2 * 1104 / 3600,
            "cost/usd_per_million_tokens": 3.6 * 2 * 104 / 3600 / 810e-6,
            "progress/tokens": 810,
            "progress/flops": 810e9,
        }
    )


@given(STEPS, STEPS)
def test_a_resumed_run_goes_on_from_its_checkpoint_and_pays_for_what_was_lost(
    before: list[tuple[float, float, int]], after: list[tuple[float, float, int]]
) -> None:
    clock = Clock()
    first = meter(clock)
    for outside, inside, tokens in before:
        clock.now += outside
        step(first, clock, inside, tokens)
    checkpoint = json.loads(json.dumps(first.state_dict()))
    step(first, clock, 7.0, 99)  # beyond the checkpoint: lost
    second = meter(clock, earlier_wall_seconds=first.wall_seconds)
    second.load_state_dict(checkpoint)
    for _, inside, tokens in after:
        step(second, clock, inside, tokens)
    train = sum(inside for _, inside, _ in [*before, *after])
    assert second.tokens == sum(tokens for _, _, tokens in [*before, *after])
    assert second.flops == pytest.approx(second.tokens * 1e9)
    assert second.train_seconds == pytest.approx(train, abs=1e-6)
    outside_training = sum(outside for outside, _, _ in before)
    assert second.wall_seconds == pytest.approx(train + 7.0 + outside_training, abs=1e-6)
    assert second.attempt_train_seconds == pytest.approx(sum(inside for _, inside, _ in after), abs=1e-6)
    assert second.attempt_tokens == sum(tokens for _, _, tokens in after)
    assert second.attempt_wall_seconds == pytest.approx(second.attempt_train_seconds, abs=1e-6)


def test_owned_devices_cost_their_wear_and_the_energy_they_drew() -> None:
    clock = Clock()
    run = meter(clock, price=OWNED)
    clock.now += 1800  # start-up
    step(run, clock, 1800.0, 1000)
    run.read_energy(joules=3.6e6, train_joules=2.7e6)
    assert run.usd_total == pytest.approx(1.8 * 2 * 1.0 + 1.0 * 0.36)
    assert run.usd_train == pytest.approx(1.8 * 2 * 0.5 + 0.75 * 0.36)
    assert run.attempt_usd_of_energy == pytest.approx(0.36)


def test_between_readings_energy_goes_on_at_its_mean_power() -> None:
    clock = Clock()
    run = meter(clock, price=OWNED)
    step(run, clock, 100.0, 1000)
    run.read_energy(joules=1000.0, train_joules=1000.0)
    step(run, clock, 50.0, 1000)
    assert run.joules_until_now() == pytest.approx(1500)
    assert run.usd_train == pytest.approx(1.8 * 2 * 150 / 3600 + 1500 / 3.6e6 * 0.36)
    assert run.usd_ahead(20.0) == pytest.approx(1.8 * 2 * 20 / 3600 + 200 / 3.6e6 * 0.36)


def test_owned_devices_whose_energy_nobody_measures_have_no_cost() -> None:
    clock = Clock()
    run = meter(clock, price=OWNED)
    step(run, clock, 100.0, 1000)
    run.read_energy(None, None)
    assert run.usd_total is run.usd_train is run.attempt_usd_of_energy is run.joules_until_now() is None


def test_rented_devices_cost_the_same_whether_their_energy_is_known_or_not() -> None:
    clock = Clock()
    run = meter(clock)
    step(run, clock, 3600.0, 1000)
    without = run.usd_total
    run.read_energy(1e9, 1e9)
    assert run.usd_total == without == pytest.approx(7.2)
    assert run.attempt_usd_of_energy == 0


def test_attempts_at_different_prices_are_each_paid_at_their_own() -> None:
    clock = Clock()
    first = meter(clock)
    step(first, clock, 3600.0, 1000)
    checkpoint = first.state_dict()
    second = meter(
        clock,
        price=rented(1.0),
        num_devices=1,
        earlier_wall_seconds=first.wall_seconds,
        earlier_usd=first.usd_total,
    )
    second.load_state_dict(checkpoint)
    step(second, clock, 1800.0, 1000)
    assert second.usd_total == second.usd_train == pytest.approx(7.2 + 0.5)


def test_figures_of_a_stopped_meter_are_of_one_moment() -> None:
    clock = Clock()
    run = meter(clock)
    step(run, clock, 10.0, 10)
    still = run.stopped()
    clock.now += 100
    assert (still.wall_seconds, run.wall_seconds) == (10, 110)


class Process:
    """A process `age` seconds old, as psutil shows it."""

    def __init__(self, age: float, command_line: list[str], parent: "Process | None" = None) -> None:
        self.created = time.clock_gettime(time.CLOCK_BOOTTIME) + psutil.boot_time() - age
        self.command_line = command_line
        self.above = parent

    def create_time(self) -> float:
        return self.created

    def cmdline(self) -> list[str]:
        return self.command_line

    def parent(self) -> "Process | None":
        return self.above


SHELL = Process(900, ["bash", "-c", "accelerate launch train.py"])


@pytest.mark.skipif(sys.platform != "linux", reason="the stand-in tells its age as Linux does")
@pytest.mark.parametrize(
    ("launcher", "counts"),
    [
        ("python /venv/bin/accelerate launch train.py", True),
        ("python -m accelerate.commands.launch train.py", True),
        ("accelerate-launch train.py", True),
        ("python /venv/bin/torchrun --nproc-per-node 2 train.py", True),
        ("python -m torch.distributed.run train.py", True),
        ("python -m pytest tests", False),
        ("python scripts/launch.py", False),
        ("bash /home/accelerate/launch/run.sh", False),
        ("accelerate test", False),
    ],
)
def test_the_age_of_a_run_is_that_of_its_launcher(monkeypatch: pytest.MonkeyPatch, launcher: str, counts: bool) -> None:
    worker = Process(100, ["python", "train.py"], Process(200, launcher.split(), SHELL))
    monkeypatch.setattr(psutil, "Process", lambda: worker)
    assert process_start_seconds_ago() == pytest.approx(200 if counts else 100, abs=30)


@pytest.mark.skipif(sys.platform != "linux", reason="the stand-in tells its age as Linux does")
def test_a_launcher_started_by_a_launcher_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    outer = Process(300, ["accelerate", "launch", "train.py"], SHELL)
    worker = Process(100, ["python", "train.py"], Process(200, ["torchrun", "train.py"], outer))
    monkeypatch.setattr(psutil, "Process", lambda: worker)
    assert process_start_seconds_ago() == pytest.approx(300, abs=30)


AGE = "from moe_train.cost.meter import process_start_seconds_ago as age; print(age())"
PARENT = "import subprocess, sys, time; time.sleep(1); subprocess.run([sys.executable, '-c', sys.argv[-1]], check=True)"


@pytest.mark.parametrize("launcher", [True, False])
def test_a_real_process_lives_at_most_as_long_as_it_was_seen_and_with_its_launcher_longer(launcher: bool) -> None:
    arguments = ["accelerate", "launch"] if launcher else []
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    start = time.monotonic()
    command = [sys.executable, "-c", PARENT, *arguments, AGE]
    age = float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    seen = time.monotonic() - start  # of which the parent slept for the first second
    clock_tick = 0.02
    assert (1 if launcher else 0) < age < seen - (0 if launcher else 1) + clock_tick
