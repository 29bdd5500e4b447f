"""Published runs predicted from each other: how near, how often the intervals hold, and against simpler guesses."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy.optimize import minimize

from moe_train.forecast.published import PublishedRun, published_runs
from moe_train.forecast.utilization_model import (
    RIDGE,
    LeftOut,
    chosen_ridge,
    constant_baseline,
    features,
    fitted,
    leave_one_out,
    median_error,
    within,
)

RUNS = published_runs()


@pytest.fixture(scope="module")
def left_out() -> list[LeftOut]:
    return leave_one_out(RUNS)


def test_every_published_run_has_its_figures_and_their_source() -> None:
    assert len(RUNS) == 27
    for run in RUNS:
        assert run.source
        assert run.evidence in ("primary", "secondary", "derived")
        assert 0.1 < run.utilization < 0.6
        assert (run.kind == "moe") == (run.total_params > 1.5 * run.active_params)


def test_utilization_is_flops_over_hours_and_peak_as_by_hand() -> None:
    (v3,) = (run for run in RUNS if run.model == "DeepSeek-V3")
    assert v3.utilization == pytest.approx(6 * 37e9 * 14.8e12 / (2_664_000 * 3600 * 989e12))
    assert v3.hours_at(v3.utilization) == pytest.approx(2_664_000)


def test_runs_left_out_are_predicted_as_near_as_was_asked(left_out: list[LeftOut]) -> None:
    assert within(left_out, 1.5) >= 0.93
    assert median_error(left_out) <= 0.15


def test_the_constants_come_no_nearer_even_in_sample(left_out: list[LeftOut]) -> None:
    constants = constant_baseline(RUNS)
    assert within(constants, 1.5) == pytest.approx(25 / 27)
    assert median_error(constants) == pytest.approx(0.20, abs=0.01)
    assert median_error(left_out) < median_error(constants)


@pytest.mark.parametrize("level", [0.5, 0.6, 0.7, 0.8, 0.9])
def test_intervals_hold_as_often_as_they_say(level: float) -> None:
    held = sum(prediction.held for prediction in leave_one_out(RUNS, level=level))
    # Two standard errors of a share of 27.
    assert held / 27 > level - 2 * math.sqrt(level * (1 - level) / 27)
    assert held / 27 < level + 2 * math.sqrt(level * (1 - level) / 27)


def test_a_prediction_knows_nothing_of_the_run_it_is_of(left_out: list[LeftOut]) -> None:
    changed = [dataclasses.replace(RUNS[3], gpu_hours=1e9), *RUNS[:3], *RUNS[4:]]
    again = leave_one_out(changed)[0]
    assert (again.utilization, again.error) == pytest.approx((left_out[3].utilization, left_out[3].error))


def test_the_ridge_is_the_one_that_predicts_best_and_choosing_it_without_the_run_costs_little() -> None:
    assert chosen_ridge(RUNS) == RIDGE
    nested = leave_one_out(RUNS, ridge=None)
    assert within(nested, 1.5) >= 0.93
    assert median_error(nested) == pytest.approx(0.187, abs=0.002)  # the honest figure: worse than 0.15


def test_the_fit_is_the_least_absolute_deviation_with_its_ridge() -> None:
    x = np.stack([features(run.kind, run.log_sparsity, run.precision) for run in RUNS])
    y = np.log([run.utilization for run in RUNS])
    scale = x.std(0)

    def objective(parameters: np.ndarray) -> float:
        residual = np.abs(y - parameters[0] - x @ parameters[1:])
        return residual.sum() + RIDGE / 2 * np.square(parameters[1:] * scale).sum()

    model = fitted(RUNS)
    ours = objective(np.array([model.intercept, *model.weights]))
    start = np.array([y.mean(), 0, 0, 0])
    found = min(
        (minimize(objective, start + shift, method="Nelder-Mead", options={"maxiter": 20_000, "xatol": 1e-9}).fun)
        for shift in (0.0, 0.1, -0.1)
    )
    assert ours <= found * 1.001


def test_what_planted_numbers_say_is_found_again() -> None:
    generator = np.random.default_rng(0)
    planted = []
    for index in range(400):
        run = RUNS[index % len(RUNS)]
        log_share = -1.0 - 0.5 * (run.kind == "moe") + 0.3 * (run.precision == "fp8") + generator.laplace(0, 0.1)
        planted.append(dataclasses.replace(run, gpu_hours=run.gpu_hours * run.utilization / math.exp(log_share)))
    model = fitted(planted)
    assert model.intercept == pytest.approx(-1.0, abs=0.03)
    moe = PublishedRun("new", "moe", 10e9, 1e9, 1e12, "h100", 1.0, "bf16", "primary", "", 989.0)
    assert model.predict(moe.kind, moe.log_sparsity, "bf16") == pytest.approx(math.exp(-1.5), rel=0.05)
    assert model.error == pytest.approx(math.exp(0.1 * math.log(10)), rel=0.1)  # nine tenths of a Laplace
