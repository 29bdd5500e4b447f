"""A figure of a benchmark: a median with its quartiles, or the reason why there is none."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# Quartiles further apart than this share of what they are of: published ones are within 0.08 (docs/results/).
UNSTEADY = 0.2


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
    unsteady: str | None = None  # why it is not to be trusted


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


def marked(figure: Figure, elsewhere: str | None) -> Figure:
    """With what speaks against it: its own quartiles, or `elsewhere`, which speaks against all that was timed then."""
    if figure.value is None or figure.spread is None:
        return figure
    low, high = figure.spread
    # A share of time lost is as good as what is left of the whole: 3% that may be 1% or 7% is 97 ± 3.
    lost = any(word in figure.name for word in ("fraction", "slowdown"))
    size = max(abs(figure.value), 1 - figure.value) if lost else abs(figure.value)
    if high - low > UNSTEADY * size:
        return dataclasses.replace(figure, unsteady=f"quartiles are {(high - low) / (size or 1):.0%} of it apart")
    return dataclasses.replace(figure, unsteady=elsewhere)


def doubts(figures: Sequence[Figure]) -> str | None:
    """What speaks against figures of a suite, in a short line; None: nothing."""
    unsteady = [(figure.name, figure.unsteady) for figure in figures if figure.unsteady is not None]
    several = sum(reason.startswith("quartiles") for _, reason in unsteady) > 1
    by_reason: dict[str, list[str]] = {}
    for name, reason in unsteady:
        own = several and reason.startswith("quartiles")  # each its own
        by_reason.setdefault("quartiles are more than a fifth apart" if own else reason, []).append(name)
    said = []
    for reason, names in by_reason.items():
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        said.append(f"{', '.join(names[:2])}{more}: {reason}")
    return "; ".join(said) or None
