"""The learning rate of every arm: the best of the same multiples of its own, on seeds that are not tested."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moe_train.claims.plan import Plan, PlannedRun
from moe_train.claims.results import Folder


def best_rates(plan: Plan, tuning: Sequence[PlannedRun], folder: Folder) -> dict[str, float] | None:
    """By arm; a rate at which a run diverged has lost. None where a run is missing, or all of an arm have diverged.

    Without tuning: the configuration's own rates.
    """
    if plan.scale.tuning is None:
        return plan.untuned()
    losses: dict[str, dict[float, list[float]]] = {name: {} for name in plan.arms}
    for run in tuning:
        result = folder.result(run)
        if result is None and folder.diverged(run) is None:
            return None  # a rate that had no chance is no rate that lost
        loss = math.inf if result is None or result.summary["val_loss"] is None else result.summary["val_loss"]
        losses[run.arm].setdefault(run.rate, []).append(loss)
    rates = {}
    for name, by_rate in losses.items():
        rate, found = min(by_rate.items(), key=lambda item: sum(item[1]))
        if math.isinf(sum(found)):
            return None
        rates[name] = rate
    return rates
