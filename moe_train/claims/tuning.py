"""The learning rate of every arm: the best of the same multiples of its own, on seeds that are not tested.

Each arm has its own best multiple, or all have the one that is best for all (`tuning.together`). A best at an edge of
the grid may be no optimum: the grid is then widened there, for all arms alike, as often as the claim allows.
"""

from __future__ import annotations

import math

from moe_train.claims.plan import Plan, PlannedRun
from moe_train.claims.results import Folder

Grid = tuple[float, ...]


def grid(plan: Plan, folder: Folder) -> Grid:
    """The multiples to be tried, as far as the runs in the folder show; ascending. Without tuning none.

    Asked again once they have been, it has more of them or is the same.
    """
    tuning = plan.scale.tuning
    if tuning is None:
        return ()
    found = tuning.factors
    for _ in range(tuning.widenings):
        best = set((_best_factors(plan, found, folder) or {}).values())
        below = (found[0] ** 2 / found[1],) if found[0] in best else ()
        above = (found[-1] ** 2 / found[-2],) if found[-1] in best else ()
        if not below and not above:
            break
        found = (*below, *found, *above)
    return found


def best_rates(plan: Plan, folder: Folder) -> dict[str, float] | None:
    """By arm; a rate at which a run diverged has lost. None where a run is missing or damaged, or where all that could
    be chosen have diverged.

    Without tuning: the configuration's own rates.
    """
    if plan.scale.tuning is None:
        return plan.untuned()
    best = _best_factors(plan, grid(plan, folder), folder)
    return None if best is None else {name: plan.arms[name].rate * factor for name, factor in best.items()}


def planned(plan: Plan, folder: Folder | None) -> list[PlannedRun]:
    """All runs of a claim, each once, at the rates that runs in the folder have chosen.

    As long as none are chosen, at the arms' own: rates do not change what runs cost.
    """
    tuning = plan.tuning_runs(() if folder is None else grid(plan, folder))
    rates = None if folder is None else best_rates(plan, folder)
    runs = [*tuning, *plan.runs(rates or plan.untuned())]
    return list({run.hash: run for run in runs}.values())


def _best_factors(plan: Plan, factors: Grid, folder: Folder) -> dict[str, float] | None:
    losses = {name: dict.fromkeys(factors, 0.0) for name in plan.arms}  # summed over seeds, by multiple
    runs = plan.tuning_runs(factors)
    results, damaged = folder.results(runs)
    there = {result.run.hash: result for result in results}
    for run in runs:
        result = there.get(run.hash)
        if damaged or (result is None and folder.diverged(run) is None):
            return None  # a rate that had no chance is no rate that lost
        loss = math.inf if result is None or result.summary["val_loss"] is None else result.summary["val_loss"]
        tried = run.rate / plan.arms[run.arm].rate
        losses[run.arm][min(factors, key=lambda factor: abs(math.log(tried / factor)))] += loss
    assert plan.scale.tuning is not None
    if plan.scale.tuning.together:
        of_all = {factor: sum(each[factor] for each in losses.values()) for factor in factors}
        losses = dict.fromkeys(losses, of_all)
    best = {name: min(of_arm.items(), key=lambda item: item[1]) for name, of_arm in losses.items()}
    if any(math.isinf(least) for _, least in best.values()):
        return None
    return {name: factor for name, (factor, _) in best.items()}
