"""The learning rate of every arm: the best of the same multiples of its own, on seeds that are not tested.

Each arm has its own best multiple, or all have the one that is best for all (`tuning.together`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from moe_train.claims.plan import Plan, PlannedRun
from moe_train.claims.results import Folder


def best_rates(plan: Plan, tuning: Sequence[PlannedRun], folder: Folder) -> dict[str, float] | None:
    """By arm; a rate at which a run diverged has lost. None where a run is missing or damaged, or where all that could
    be chosen have diverged.

    Without tuning: the configuration's own rates.
    """
    if plan.scale.tuning is None:
        return plan.untuned()
    losses: dict[str, dict[float, float]] = {name: {} for name in plan.arms}  # summed over seeds, by multiple
    results, damaged = folder.results(tuning)
    there = {result.run.hash: result for result in results}
    for run in tuning:
        result = there.get(run.hash)
        if damaged or (result is None and folder.diverged(run) is None):
            return None  # a rate that had no chance is no rate that lost
        loss = math.inf if result is None or result.summary["val_loss"] is None else result.summary["val_loss"]
        by_factor, factor = losses[run.arm], plan.factor(run)
        by_factor[factor] = by_factor.get(factor, 0.0) + loss
    if plan.scale.tuning.together:
        of_all = {factor: sum(each[factor] for each in losses.values()) for factor in plan.scale.tuning.factors}
        losses = dict.fromkeys(losses, of_all)
    rates = {}
    for name, by_factor in losses.items():
        factor, least = min(by_factor.items(), key=lambda item: item[1])
        if math.isinf(least):
            return None
        rates[name] = plan.arms[name].rate * factor
    return rates
