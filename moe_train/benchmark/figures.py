"""A figure of a benchmark: a median with its quartiles, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """The median of repetitions and the quartiles around it."""

    value: float
    low: float
    high: float
    repetitions: int


@dataclass(frozen=True)
class Figure:
    """One line of a suite. `of` says what was measured; `value` None: not measured, for the reason in `note`."""

    suite: str
    name: str
    value: float | None
    unit: str
    of: str = ""
    spread: tuple[float, float] | None = None  # quartiles; None of what is counted and not timed
    repetitions: int | None = None
    note: str | None = None


def estimate(values: Sequence[float]) -> Estimate:
    """Median and quartiles of at least one value."""
    low, value, high = np.quantile(np.asarray(values, dtype=np.float64), (0.25, 0.5, 0.75)).tolist()
    return Estimate(value, low, high, len(values))


def paired(numerators: Sequence[float], denominators: Sequence[float], scale: float = 1.0) -> Estimate:
    """`scale` times the ratio, taken within each round: what slows a whole round, neighbours above all, cancels out."""
    return estimate([scale * a / b for a, b in zip(numerators, denominators, strict=True)])


def measured(suite: str, name: str, found: Estimate, unit: str, of: str = "", note: str | None = None) -> Figure:
    return Figure(suite, name, found.value, unit, of, (found.low, found.high), found.repetitions, note)


def not_measured(suite: str, name: str, unit: str, reason: str, of: str = "") -> Figure:
    return Figure(suite, name, None, unit, of, note=reason)
