"""The tests: of a mean against a bound, both ways, with Student's t; Holm's adjustment; what a test can see.

Every comparison is asked two questions, each at level alpha: does the evidence hold for the statement, does it hold
against it? Whatever the truth, at most one of the two answers can be wrong, so alpha bounds the rate of wrong verdicts
of either kind; where neither question is answered the verdict is inconclusive. The interval shown is the one of the two
one-sided tests, of 1 − 2·alpha.

Superiority and non-inferiority are one-sided t tests of a shifted mean; equivalence is two of them (TOST, Schuirmann,
J. Pharmacokinet. Biopharm. 15, 1987); families are adjusted by Holm (Scand. J. Statist. 6, 1979). All functions take
arrays whose last axis is the seeds, so that thousands of simulated suites go through the very code of one real suite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import integrate, stats

from moe_train.config.claim import Kind

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Mean:
    """An estimated mean with its standard error and degrees of freedom: arrays of one shape, an element a suite."""

    value: Array
    error: Array
    freedom: Array

    @classmethod
    def of(cls, values: npt.ArrayLike) -> Mean:
        """Of independent values along the last axis; paired differences are such values."""
        x = np.asarray(values, float)
        n = x.shape[-1]
        freedom = np.full(x.shape[:-1], float(n - 1))
        return cls(x.mean(-1), x.std(-1, ddof=1) / np.sqrt(n), freedom)

    @classmethod
    def of_difference(cls, first: npt.ArrayLike, second: npt.ArrayLike) -> Mean:
        """Of unpaired samples with variances of their own (Welch, Biometrika 34, 1947)."""
        a, b = cls.of(first), cls.of(second)
        va, vb = a.error**2, b.error**2
        with np.errstate(divide="ignore", invalid="ignore"):
            freedom = (va + vb) ** 2 / (va**2 / a.freedom + vb**2 / b.freedom)
        return cls(a.value - b.value, np.sqrt(va + vb), np.where(np.isfinite(freedom), freedom, a.freedom))

    def p_below(self, bound: float) -> Array:
        """How likely so low a mean would be if the true one were at `bound` or above it."""
        return self._p(bound - self.value)

    def p_above(self, bound: float) -> Array:
        return self._p(self.value - bound)

    def _p(self, distance: Array) -> Array:
        """One-sided, of a mean that lies `distance` on the right side of a bound. Without scatter it is a fact."""
        with np.errstate(divide="ignore", invalid="ignore"):
            p = stats.t.sf(distance / self.error, self.freedom)
        return np.where(self.error > 0, p, np.where(distance > 0, 0.0, 1.0))

    def p_difference(self) -> Array:
        """Two-sided, against a true mean of zero."""
        exact = np.where(self.value == 0, 1.0, 0.0)
        return np.where(self.error > 0, np.minimum(1, 2 * np.minimum(self.p_below(0), self.p_above(0))), exact)

    def interval(self, level: float) -> tuple[Array, Array]:
        half = stats.t.ppf((1 + level) / 2, self.freedom) * self.error
        return self.value - half, self.value + half


def p_values(mean: Mean, kind: Kind, margin: float) -> tuple[Array, Array]:
    """(for, against) the statement that `kind` and `margin` make of a true mean; `ratio_above` is of logarithms."""
    if kind == "tost":
        inside = np.maximum(mean.p_below(margin), mean.p_above(-margin))
        outside = np.minimum(1, 2 * np.minimum(mean.p_above(margin), mean.p_below(-margin)))
        return inside, outside
    if kind == "ratio_above":
        bound = float(np.log(margin))
        return mean.p_above(bound), mean.p_below(bound)
    if kind == "above":
        return mean.p_above(margin), mean.p_below(margin)
    bound = {"superiority": -margin, "non_inferiority": margin, "below": margin}[kind]
    return mean.p_below(bound), mean.p_above(bound)


def holm(p: npt.ArrayLike) -> Array:
    """Adjusted p values of a family along the last axis: reject where they are at most alpha."""
    p = np.asarray(p, float)
    order = np.argsort(p, axis=-1)
    count = p.shape[-1]
    stepped = np.take_along_axis(p, order, -1) * (count - np.arange(count))
    adjusted = np.minimum(1, np.maximum.accumulate(stepped, axis=-1))
    out = np.empty_like(p)
    np.put_along_axis(out, order, adjusted, -1)
    return out


# ---------------------------------------------------------------------------------------------------------- power


def power(kind: Kind, margin: float, effect: float, sigma: float, seeds: int, alpha: float) -> float:
    """How often the statement is supported where the true mean is `effect`; `sigma` is of one value (of a pair)."""
    error, freedom = sigma / np.sqrt(seeds), seeds - 1
    critical = stats.t.ppf(1 - alpha, freedom)
    if kind == "tost":
        return _power_of_tost(margin, effect, error, freedom, critical)
    if kind == "ratio_above":
        distance = effect - float(np.log(margin))
    elif kind == "above":
        distance = effect - margin
    else:
        distance = {"superiority": -margin, "non_inferiority": margin, "below": margin}[kind] - effect
    return float(stats.nct.sf(critical, freedom, distance / error))


def _power_of_tost(margin: float, effect: float, error: float, freedom: int, critical: float) -> float:
    """The mean is normal and its estimated error an independent chi: over the latter it is integrated."""

    def inside(ratio: float) -> float:  # of the estimated error to the true one
        room = margin - critical * error * ratio
        if room <= 0:
            return 0.0
        share = stats.norm.cdf((room - effect) / error) - stats.norm.cdf((-room - effect) / error)
        density = stats.chi.pdf(ratio * np.sqrt(freedom), freedom) * np.sqrt(freedom)
        return float(share * density)

    last = margin / (critical * error)  # beyond it no mean is inside
    return float(integrate.quad(inside, 0, min(last, 10.0), limit=200)[0])


def detectable(sigma: float, seeds: int, alpha: float, wanted: float = 0.8) -> float:
    """How far beyond its bound a true mean has to lie to be seen in `wanted` of all suites (one-sided)."""
    low, high = 0.0, 1e3 * sigma
    for _ in range(60):
        middle = (low + high) / 2
        seen = power("above", 0.0, middle, sigma, seeds, alpha)
        low, high = (low, middle) if seen >= wanted else (middle, high)
    return high


MOST_SEEDS = 1000


def seeds_needed(kind: Kind, margin: float, sigma: float, alpha: float, wanted: float = 0.8) -> int | None:
    """The fewest that show the statement in `wanted` of all suites where there is no difference; None: over 1,000."""
    low, high = 1, MOST_SEEDS
    if power(kind, margin, 0.0, sigma, high, alpha) < wanted:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(kind, margin, 0.0, sigma, middle, alpha) >= wanted else (middle, high)
    return high


def binomial_interval(successes: int, trials: int, level: float) -> tuple[float, float]:
    """Of a share, exact (Clopper and Pearson, Biometrika 26, 1934)."""
    interval: Any = stats.binomtest(successes, trials).proportion_ci(level, method="exact")
    return float(interval.low), float(interval.high)
