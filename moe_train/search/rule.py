"""How the best setting moves with size or money: y = c·x^a, over the best of every study.

The best of one study is the vertex of a parabola through its losses over log y, as in Chinchilla's second approach
(arXiv 2203.15556): less noisy than the best trial, whose loss may be luck. Where the parabola has no lowest point among
what was tried, the best trial is taken, and where that lies at the edge of what was tried, it says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_train.search.points import Point

NEAREST = 7  # points, the best ones, a parabola goes through at most: far from the vertex losses are no parabola


@dataclass(frozen=True)
class Best:
    """Of one study. `how`: "parabola", "best trial", or "edge", where a wider range may hold a better one."""

    level: dict[str, Any]
    x: float
    y: float
    how: str


@dataclass(frozen=True)
class Rule:
    """y = c·x^a. `standard_error`: of a, None of fewer than three studies."""

    c: float
    a: float
    standard_error: float | None


def best_of(points: Sequence[Point], x: str, y: str) -> Best | None:
    """None where a study has no point with both, above zero."""
    known = [(p.number(y), p.values[0], p) for p in points]
    found = [(value, loss, point) for value, loss, point in known if value is not None and value > 0]
    if not found:
        return None
    best_y, _, best = min(found, key=lambda each: each[1])
    at_x = best.number(x)
    if at_x is None or at_x <= 0:
        return None
    tried = sorted({value for value, _, _ in found})
    vertex = _vertex([(value, loss) for value, loss, _ in found])
    if vertex is not None and tried[0] <= vertex <= tried[-1]:
        return Best(best.level, at_x, vertex, "parabola")
    how = "edge" if best_y in (tried[0], tried[-1]) else "best trial"
    return Best(best.level, at_x, best_y, how)


def _vertex(losses: Sequence[tuple[float, float]]) -> float | None:
    nearest = sorted(losses, key=lambda each: each[1])[:NEAREST]
    if len({value for value, _ in nearest}) < 4:  # three unknowns
        return None
    logs = np.log([value for value, _ in nearest])
    middle = float(logs.mean())
    curvature, slope, _ = np.polyfit(logs - middle, [loss for _, loss in nearest], 2)
    return None if curvature <= 0 else math.exp(middle - slope / (2 * curvature))


def fit(bests: Sequence[Best]) -> Rule | None:
    """None where there are not two values of x to draw a line through."""
    if len({best.x for best in bests}) < 2:
        return None
    x, y = (np.log([getattr(best, axis) for best in bests]) for axis in ("x", "y"))
    a, log_c = np.polyfit(x, y, 1)
    error = None
    if len(bests) > 2:
        left = y - (a * x + log_c)
        error = math.sqrt(float((left**2).sum()) / (len(bests) - 2) / float(((x - x.mean()) ** 2).sum()))
    return Rule(math.exp(log_c), float(a), error)
