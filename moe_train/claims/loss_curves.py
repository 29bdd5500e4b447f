"""Loss and expert load over tokens, FLOPs, seconds and dollars: mean and range over the seeds of every arm.

Seconds and dollars are those of steps at the pace they have once kernels are loaded, as on the axes (axes.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_train.claims.axes import AXES, cost
from moe_train.claims.results import Result, Row, warm_up_seconds

POINTS = 120  # of a curve, at most
_AXES = {"tokens": "progress/tokens", "flops": "progress/flops", "usd": "cost/usd_train"}
LOAD = "moe/max_violation"


def curves_of(results: Sequence[Result], budget: int) -> dict[str, Any]:
    """By arm: x on each axis, and of `loss` (and `load` where there are experts) the mean, low and high, rounded."""
    curves = {}
    for arm in dict.fromkeys(result.run.arm for result in results):
        runs = [r for r in results if r.run.arm == arm and r.run.budget == budget]
        if curve := _of_arm([r.rows for r in runs]):
            curves[arm] = _shifted(curve, [r.start for r in runs if r.start is not None])
    return curves


def _shifted(curve: dict[str, Any], starts: Sequence[Result]) -> dict[str, Any]:
    """A curve begins at the cost of the runs that its own started from."""
    for axis in AXES if starts else ():
        if curve[axis] is not None:
            before = float(np.mean([cost(axis, start) for start in starts]))
            curve[axis] = [_rounded(before + at) for at in curve[axis]]
    return curve


def _of_arm(runs: Sequence[list[Row]]) -> dict[str, Any]:
    by_step = [{row["step"]: row for row in rows} for rows in runs]
    steps = sorted(set.intersection(*map(set, by_step))) if by_step else []
    every = -(-len(steps) // POINTS) or 1
    steps = steps[::-1][::every][::-1]  # the end is kept
    rows = [[rows[step] for rows in by_step] for step in steps]
    if not rows:
        return {}
    curve: dict[str, Any] = {axis: _mean(rows, key) for axis, key in _AXES.items()}
    seconds = [_train_seconds(list(rows_of_run.values())) for rows_of_run in by_step]
    taken = np.array([[of_run[step] for of_run in seconds] for step in steps])
    warm = np.array([warm_up_seconds(rows) for rows in runs])
    curve["seconds"] = [_rounded(value) for value in (taken - warm).mean(1).tolist()]
    if curve["usd"] is not None:
        curve["usd"] = [_rounded(usd * (1 - part)) for usd, part in zip(curve["usd"], (warm / taken).mean(1).tolist())]
    curve["loss"] = _band(rows, "train/loss")
    if all(row.get(LOAD) is not None for step in rows for row in step):
        curve["load"] = _band(rows, LOAD)
    return curve


def _train_seconds(rows: Sequence[Row]) -> dict[int, float]:
    """Seconds of training steps up to each logged one; a row has the mean step since the one before."""
    total, before, found = 0.0, 0, {}
    for row in sorted(rows, key=lambda row: int(row["step"])):
        total += (row["step"] - before) * row["throughput/step_seconds"]
        before = row["step"]
        found[before] = total
    return found


def _mean(rows: Sequence[Sequence[Row]], key: str) -> list[float] | None:
    if any(row.get(key) is None for step in rows for row in step):
        return None
    return [_rounded(float(np.mean([row[key] for row in step]))) for step in rows]


def _band(rows: Sequence[Sequence[Row]], key: str) -> dict[str, list[float]]:
    values = np.array([[row[key] for row in step] for step in rows], float)
    made = {"mean": values.mean(1), "low": values.min(1), "high": values.max(1)}
    return {name: [_rounded(value) for value in each.tolist()] for name, each in made.items()}


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
