"""What an arm needs for another's final loss: curves L = E + a·C^−b through its budgets, inverted, with an interval.

The curve is fitted by least squares to the means over seeds. The interval is a bootstrap over seeds: with each draw
the mean of every budget of every arm moves by the seeds' own deviations in random proportions, so that what the seeds
have in common stays common. Drawing seeds with replacement gives intervals that are far too narrow for three or five of
them; normal multipliers scaled by the root of a chi square make a linear figure's interval exactly Student's.

Nothing is extrapolated. Where the loss lies outside what an arm's budgets reached, the nearest budget is a bound of the
cost, and counts as one: a draw that says "at most" shows no saving, one that says "at least" refutes none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

DRAWS = 10_000
_EXPONENTS = np.geomspace(0.02, 3.0, 48)  # b; published ones are 0.05 to 0.5, short runs fall faster


@dataclass(frozen=True)
class Curve:
    """`draws` curves through the same budgets: E, a and b of each, (draws,)."""

    limit: Array
    factor: Array
    exponent: Array


def fit(cost: Array, loss: Array) -> Curve:
    """Least squares of every row of `loss` (draws, budgets) at `cost` (budgets,): E and a in closed form for each b."""
    scaled = cost / cost[-1]  # a and E do not depend on the unit then
    designs = np.stack([np.stack([np.ones_like(scaled), scaled**-b], 1) for b in _EXPONENTS])  # (b, budgets, 2)
    solve = np.linalg.pinv(designs)  # (b, 2, budgets)
    coefficients = np.einsum("bkn,dn->dbk", solve, loss)
    coefficients[..., 0] = np.where(coefficients[..., 1] < 0, loss.mean(-1)[:, None], coefficients[..., 0])
    coefficients[..., 1] = np.maximum(coefficients[..., 1], 0)  # a curve that rises is none: flat at its mean
    residual = loss[:, None] - np.einsum("bnk,dbk->dbn", designs, coefficients)
    best = (residual**2).sum(-1).argmin(-1)
    chosen = coefficients[np.arange(len(loss)), best]
    exponent = _EXPONENTS[best]
    return Curve(chosen[:, 0], chosen[:, 1] * cost[-1] ** exponent, exponent)


def cost_of(curve: Curve, target: Array, cost: Array) -> tuple[Array, Array]:
    """(draws,) cost at which the curve reaches `target`, within the budgets; and −1, 0 or 1: below, within, beyond."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        needed = (curve.factor / (target - curve.limit)) ** (1 / curve.exponent)
    never = target <= curve.limit  # flat curves and targets below the curve's end
    needed = np.where(never, np.inf, needed)
    needed = np.where(~never & (curve.factor == 0), 0.0, needed)
    side = np.where(needed < cost[0], -1, np.where(needed > cost[-1], 1, 0))
    return np.clip(needed, cost[0], cost[-1]), side


@dataclass(frozen=True)
class Saving:
    """How many times as much `against` takes as the arm for the loss at which it ends, and what draws say of its log.

    low, high: (draws,) bounds of each draw's logarithm: equal where the loss lies within the arm's budgets.
    """

    ratio: float
    low: Array
    high: Array
    bound: str | None  # "at least" or "at most" where the measured loss lies outside the arm's budgets

    def p_values(self, margin: float) -> tuple[float, float]:
        """(for, against) a true ratio above `margin`; never less than one draw in all."""
        least = 1 / len(self.low)
        not_above = 1 - float((self.low > np.log(margin)).mean())  # what is no number shows nothing
        not_below = 1 - float((self.high < np.log(margin)).mean())
        return max(not_above, least), max(not_below, least)

    def interval(self, level: float) -> tuple[float, float | None]:
        """From 0 where nothing bounds it from below, to None where nothing does from above."""
        low = np.exp(np.quantile(self.low, (1 - level) / 2, method="lower"))
        high = np.exp(np.quantile(self.high, (1 + level) / 2, method="higher"))
        return float(low), float(high) if np.isfinite(high) else None


def saving(
    budgets_arm: Array,
    loss_arm: Array,
    budgets_against: Array,
    loss_against: Array,
    log_price_ratio: Array | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Saving:
    """Cost ratio against / arm at the loss where `against` ends with its largest budget.

    budgets_*: (budgets,) ascending, in one unit. loss_*: (seeds, budgets), row s of both from the same seed.
    log_price_ratio: (seeds,) log of what a unit costs `against` over what it costs the arm (dollars a token, say).
    """
    seeds, count = loss_arm.shape
    prices = np.zeros(seeds) if log_price_ratio is None else log_price_ratio
    everything = np.concatenate([loss_arm, loss_against, prices[:, None]], axis=1)
    mean = everything.mean(0)
    random = np.random.default_rng(seed)
    tail = np.sqrt((seeds - 1) / random.chisquare(seeds - 1, draws))
    weights = random.standard_normal((draws, seeds)) * tail[:, None]
    moved = mean + weights @ (everything - mean) / np.sqrt(seeds * (seeds - 1))
    moved = np.concatenate([mean[None], moved])  # the first is what was measured
    curve = fit(budgets_arm, moved[:, :count])
    needed, side = cost_of(curve, moved[:, -2], budgets_arm)
    log_ratio = np.log(budgets_against[-1] / needed) + moved[:, -1]
    bound = {-1: "at least", 0: None, 1: "at most"}[int(side[0])]
    low, high = np.where(side == 1, -np.inf, log_ratio), np.where(side == -1, np.inf, log_ratio)
    return Saving(float(np.exp(log_ratio[0])), low[1:], high[1:], bound)
