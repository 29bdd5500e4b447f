"""What share of the peak a run will use, learnt from published runs: four numbers, and an interval that was tested.

    log utilisation = a + b · moe + c · log(total/active parameters) + d · fp8

fitted by least absolute deviations, since some published runs are far off for reasons nobody wrote down (Llama-3.1-8B
took 2.5 times the GPU-hours that OLMo-3-7B's rate would have meant on the same device). b, c and d are drawn towards 0
by a ridge on standardised features, since seven mixtures carry them, three of these in FP8. Active size, device
generation and amount of compute were tried and made the prediction of runs left out worse (docs/log.md).

The interval is the k-th smallest absolute error of runs left out, the conformal rank k = ⌈(n + 1) · level⌉ (the
jackknife of Barber et al., arXiv 1905.02928): it asks for no distribution, only that the next run is like these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_train.forecast.published import PublishedRun

Array = NDArray[np.float64]

LEVEL = 0.9
RIDGES = (1.0, 2.0, 4.0, 8.0, 16.0)
# The one of RIDGES with the smallest mean absolute error of runs left out; `chosen_ridge` is how it was found.
RIDGE = 4.0
_SMOOTH = 1e-3  # below this, a deviation counts as a square: the fit is then unique
_ROUNDS = 60


def features(kind: str, log_sparsity: float, precision: str) -> Array:
    return np.array([float(kind == "moe"), log_sparsity, float(precision == "fp8")])


@dataclass(frozen=True)
class UtilizationModel:
    """`error` is the interval's half width as a factor: utilisation lies within value / error and value · error."""

    intercept: float
    weights: Array  # of moe, log sparsity, fp8
    error: float
    runs: int
    range_of_params: tuple[float, float]  # active, of the runs it was fitted on
    max_sparsity: float

    def predict(self, kind: str, log_sparsity: float, precision: str) -> float:
        return float(np.exp(self.intercept + features(kind, log_sparsity, precision) @ self.weights))


def fitted(runs: Sequence[PublishedRun], ridge: float = RIDGE, level: float = LEVEL) -> UtilizationModel:
    x, y = _data(runs)
    intercept, weights = _fit(x, y, ridge)
    sizes = [run.active_params for run in runs]
    return UtilizationModel(
        intercept,
        weights,
        error=math.exp(_conformal(np.abs(_errors_of_left_out(x, y, ridge)), level)),
        runs=len(runs),
        range_of_params=(min(sizes), max(sizes)),
        max_sparsity=max(run.total_params / run.active_params for run in runs),
    )


@dataclass(frozen=True)
class LeftOut:
    """A run predicted by a model that never saw it. `error` is its interval, also made without it."""

    run: PublishedRun
    utilization: float
    error: float

    @property
    def gpu_hours(self) -> float:
        return self.run.hours_at(self.utilization)

    @property
    def ratio(self) -> float:
        """Predicted over published GPU-hours."""
        return self.gpu_hours / self.run.gpu_hours

    @property
    def interval(self) -> tuple[float, float]:
        """Of GPU-hours."""
        return self.gpu_hours / self.error, self.gpu_hours * self.error

    @property
    def held(self) -> bool:
        low, high = self.interval
        return low <= self.run.gpu_hours <= high


def leave_one_out(runs: Sequence[PublishedRun], ridge: float | None = RIDGE, level: float = LEVEL) -> list[LeftOut]:
    """Every run predicted from the others. `ridge` None: chosen anew from the others each time (`chosen_ridge`)."""
    found = []
    for index, run in enumerate(runs):
        others = [*runs[:index], *runs[index + 1 :]]
        model = fitted(others, chosen_ridge(others) if ridge is None else ridge, level)
        found.append(LeftOut(run, model.predict(run.kind, run.log_sparsity, run.precision), model.error))
    return found


def chosen_ridge(runs: Sequence[PublishedRun]) -> float:
    x, y = _data(runs)
    return min(RIDGES, key=lambda ridge: float(np.abs(_errors_of_left_out(x, y, ridge)).mean()))


def constant_baseline(runs: Sequence[PublishedRun]) -> list[LeftOut]:
    """Every run at the utilisation usually assumed: 35% dense, 22% MoE."""
    return [LeftOut(run, 0.35 if run.kind == "dense" else 0.22, 1.0) for run in runs]


def median_error(predictions: Sequence[LeftOut]) -> float:
    """How far off the middle prediction is, as a fraction: 0.15 is a factor of 1.15 either way."""
    return float(np.exp(np.median([abs(math.log(p.ratio)) for p in predictions])) - 1)


def within(predictions: Sequence[LeftOut], factor: float) -> float:
    return float(np.mean([abs(math.log(p.ratio)) < math.log(factor) for p in predictions]))


def _data(runs: Sequence[PublishedRun]) -> tuple[Array, Array]:
    x = np.stack([features(run.kind, run.log_sparsity, run.precision) for run in runs])
    return x, np.log([run.utilization for run in runs])


def _fit(x: Array, y: Array, ridge: float) -> tuple[float, Array]:
    """Iteratively reweighted least squares on standardised features; back in their own units."""
    mean, scale = x.mean(0), x.std(0)
    scale = np.where(scale > 0, scale, 1.0)
    z = np.column_stack([np.ones(len(y)), (x - mean) / scale])
    penalty = ridge * np.diag([0.0, *np.ones(x.shape[1])])
    solution = np.zeros(z.shape[1])
    solution[0] = np.median(y)
    for _ in range(_ROUNDS):
        weight = 1 / np.maximum(np.abs(y - z @ solution), _SMOOTH)
        weighted = z * weight[:, None]
        solution = np.linalg.solve(weighted.T @ z + penalty, weighted.T @ y)
    weights = solution[1:] / scale
    return float(solution[0] - mean @ weights), weights


def _errors_of_left_out(x: Array, y: Array, ridge: float) -> Array:
    errors = []
    for index in range(len(y)):
        intercept, weights = _fit(np.delete(x, index, 0), np.delete(y, index), ridge)
        errors.append(intercept + x[index] @ weights - y[index])
    return np.array(errors)


def _conformal(absolute_errors: Array, level: float) -> float:
    rank = math.ceil((len(absolute_errors) + 1) * level)
    return float(np.sort(absolute_errors)[min(rank, len(absolute_errors)) - 1])
