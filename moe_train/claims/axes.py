"""What an arm saves on each of four axes: tokens, FLOPs, seconds, dollars.

With several budgets: how many times as much the other arm takes for the loss at which it ends. With one: what both took
in all, beside the losses they reached; an arm that started from another's run has taken what that took as well. Seconds
and dollars are those of training steps alone, all at the pace that they have once kernels are loaded; what starting,
evaluating and saving cost is a matter of the length of runs, not of the technique.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_train.claims.curves import fit, saving
from moe_train.claims.plan import Plan
from moe_train.claims.results import Result, warm_up_seconds
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
    at: str  # "equal loss" or "the end of both"
    loss_difference: float  # arm − against, nats a token, at the largest budget
    axes: dict[str, Saved | None] = field(default_factory=dict)


def cost(axis: str, result: Result) -> float:
    """Of the training steps of a run, with those of the run it started from."""
    summary = result.summary
    seconds = float(summary["train_seconds"])
    warm = 1 - warm_up_seconds(result.rows) / seconds
    own: float = {
        "tokens": float(summary["tokens"]),
        "flops": summary["tokens"] * float(summary["flops_per_token"]),
        "seconds": seconds * warm,
        "usd": float(summary["usd_train"] or 0.0) * warm,  # integrity.py lets no price of 0 through
    }[axis]
    return own + (0.0 if result.start is None else cost(axis, result.start))


def price_ratio(
    axis: str, plan: Plan, results: Sequence[Result], arm: str, against: str, per_token: bool = True
) -> Array:
    """(seeds,) log of what runs of `against` cost over what those of `arm` do, in the largest budget.

    per_token: a token that the run itself was trained on; else the whole run.
    """
    last = len(plan.scale.tokens) - 1

    def logs(name: str) -> Array:
        runs = [r for r in results if r.run.arm == name and r.run.budget == last]
        ordered = sorted(runs, key=lambda r: r.run.seed)
        return np.log([cost(axis, r) / (r.summary["tokens"] if per_token else 1.0) for r in ordered])

    return logs(against) - logs(arm)


def saved_on_axes(plan: Plan, results: Sequence[Result], without: Collection[str]) -> list[SavedOnAxes]:
    """Of every pair of arms that is compared. `without`: axes that may not be."""
    found = []
    for arm, against in plan.claim.config.pairs_at(plan.scale_name):
        curves = len(plan.scale.tokens) >= MIN_BUDGETS
        ours, theirs = (losses_by_budget(plan, results, name) for name in (arm, against))
        axes: dict[str, Saved | None] = {}
        for axis in AXES:
            if axis in without:
                axes[axis] = None
                continue
            prices = price_ratio(axis, plan, results, arm, against, per_token=curves)
            axes[axis] = _to_target(ours, theirs, prices) if curves else _at_the_end(prices)
        difference = float((ours[1][:, -1] - theirs[1][:, -1]).mean())
        found.append(SavedOnAxes(arm, against, "equal loss" if curves else "the end of both", difference, axes))
    return found


def losses_by_budget(plan: Plan, results: Sequence[Result], arm: str) -> tuple[Array, Array]:
    """Tokens of each budget, and losses (seeds, budgets)."""
    columns = [
        sorted((r for r in results if r.run.arm == arm and r.run.budget == budget), key=lambda r: r.run.seed)
        for budget in range(len(plan.scale.tokens))
    ]
    tokens = np.array([np.mean([r.summary["tokens"] for r in column]) for column in columns], float)
    return tokens, np.array([[r.summary["val_loss"] for r in column] for column in columns], float).T


def fits(plan: Plan, results: Sequence[Result]) -> list[dict[str, Any]]:
    """Of every arm with enough budgets: its mean losses, the curve through them (over its own tokens), what is left."""
    found: list[dict[str, Any]] = []
    for arm in plan.arms if len(plan.scale.tokens) >= MIN_BUDGETS else ():
        tokens, losses = losses_by_budget(plan, results, arm)
        mean = losses.mean(0)
        curve = fit(tokens, mean[None])
        limit, exponent = float(curve.limit[0]), float(curve.exponent[0])
        residual = float(np.abs(mean - limit - curve.factor[0] * tokens**-exponent).max())
        found.append({"arm": arm, "losses": mean.tolist(), "limit": limit, "exponent": exponent, "residual": residual})
    return found


def _to_target(ours: tuple[Array, Array], theirs: tuple[Array, Array], prices: Array) -> Saved:
    found = saving(*ours, *theirs, prices)
    return Saved(found.ratio, *found.interval(LEVEL), found.bound)


def _at_the_end(prices: Array) -> Saved:
    mean = Mean.of(prices)
    low, high = mean.interval(LEVEL)
    return Saved(float(np.exp(mean.value)), float(np.exp(low)), float(np.exp(high)))
