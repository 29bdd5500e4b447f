"""What an arm saves on each of four axes: tokens, FLOPs, seconds, dollars.

With several budgets: how many times as much the other arm takes for the loss at which it ends. With one: what the same
tokens take, and the loss they reach. Seconds and dollars are those of training steps alone; what starting, evaluating
and saving cost is a matter of the length of runs, not of the technique.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from moe_train.claims.curves import saving
from moe_train.claims.plan import Plan
from moe_train.claims.results import Result
from moe_train.claims.statistics import Array, Mean
from moe_train.config.claim import MIN_BUDGETS

AXES = ("tokens", "flops", "seconds", "usd")
LEVEL = 0.9


@dataclass(frozen=True)
class Saved:
    """`ratio`: against / arm, above 1 where the arm takes less; `high` None where nothing bounds it."""

    ratio: float
    low: float
    high: float | None
    bound: str | None = None


@dataclass(frozen=True)
class SavedOnAxes:
    arm: str
    against: str
    at: str  # "equal loss" or "equal tokens"
    loss_difference: float  # arm − against, nats a token, at the largest budget
    axes: dict[str, Saved | None] = field(default_factory=dict)


def unit_cost(axis: str, result: Result) -> float:
    """Of one token of the run."""
    summary = result.summary
    if axis == "flops":
        return float(summary["flops_per_token"])
    if axis == "tokens":
        return 1.0
    amount = {"seconds": summary["train_seconds"], "usd": summary["usd_train"]}[axis]
    return float(amount) / float(summary["tokens"])


def price_ratio(axis: str, plan: Plan, results: Sequence[Result], arm: str, against: str) -> Array:
    """(seeds,) log of what a token costs `against` over what it costs `arm`, in the runs with the largest budget."""
    last = len(plan.scale.tokens) - 1

    def logs(name: str) -> Array:
        runs = [r for r in results if r.run.arm == name and r.run.budget == last]
        return np.log([unit_cost(axis, r) for r in sorted(runs, key=lambda r: r.run.seed)])

    return logs(against) - logs(arm)


def saved_on_axes(plan: Plan, results: Sequence[Result], with_costs: bool) -> list[SavedOnAxes]:
    """Of every pair of arms that is compared. `with_costs`: whether seconds and dollars may be."""
    found = []
    for arm, against in plan.claim.config.pairs_at(plan.scale_name):
        curves = len(plan.scale.tokens) >= MIN_BUDGETS
        ours, theirs = (losses_by_budget(plan, results, name) for name in (arm, against))
        axes: dict[str, Saved | None] = {}
        for axis in AXES:
            if axis in ("seconds", "usd") and not with_costs:
                axes[axis] = None
                continue
            prices = price_ratio(axis, plan, results, arm, against)
            axes[axis] = _to_target(ours, theirs, prices) if curves else _at_equal_tokens(prices)
        difference = float((ours[1][:, -1] - theirs[1][:, -1]).mean())
        found.append(SavedOnAxes(arm, against, "equal loss" if curves else "equal tokens", difference, axes))
    return found


def losses_by_budget(plan: Plan, results: Sequence[Result], arm: str) -> tuple[Array, Array]:
    """Tokens of each budget, and losses (seeds, budgets)."""
    columns = [
        sorted((r for r in results if r.run.arm == arm and r.run.budget == budget), key=lambda r: r.run.seed)
        for budget in range(len(plan.scale.tokens))
    ]
    tokens = np.array([np.mean([r.summary["tokens"] for r in column]) for column in columns], float)
    return tokens, np.array([[r.summary["val_loss"] for r in column] for column in columns], float).T


def _to_target(ours: tuple[Array, Array], theirs: tuple[Array, Array], prices: Array) -> Saved:
    found = saving(*ours, *theirs, prices)
    return Saved(found.ratio, *found.interval(LEVEL), found.bound)


def _at_equal_tokens(prices: Array) -> Saved:
    mean = Mean.of(prices)
    low, high = mean.interval(LEVEL)
    return Saved(float(np.exp(mean.value)), float(np.exp(low)), float(np.exp(high)))
