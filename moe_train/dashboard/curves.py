"""Long series as few points that look the same: hundreds of runs must fit into one page."""

from __future__ import annotations

from collections.abc import Sequence

MAX_POINTS = 300  # of a run's loss: about as many as a phone has pixels
ALL_POINTS = 50_000  # of all runs together: a browser draws them in about a second
LOAD_POINTS = 7  # times fewer points of the load of experts, which is layers × statistics


def points_each(runs: int) -> int:
    """How many points of a curve each of so many runs may have."""
    return min(MAX_POINTS, max(30, ALL_POINTS // max(1, runs)))


def thinned(values: Sequence[float], most: int) -> list[int]:
    """Indices of at most `most` points: first, last, and of every equal stretch between them the lowest and highest.

    Points are kept as they were logged; nothing is averaged, so no spike is lost and none is made.
    """
    count = len(values)
    if count <= most:
        return list(range(count))
    stretches = (most - 2) // 2
    kept = {0, count - 1}
    for stretch in range(stretches):
        start = 1 + stretch * (count - 2) // stretches
        end = 1 + (stretch + 1) * (count - 2) // stretches
        kept.add(min(range(start, end), key=values.__getitem__))
        kept.add(max(range(start, end), key=values.__getitem__))
    return sorted(kept)


def evenly(count: int, most: int) -> list[int]:
    """Indices of at most `most` of `count` points, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(index * (count - 1) / (most - 1)) for index in range(most)})


def short(value: float | None) -> float | int | None:
    """Five digits: what a chart can show and a reader read off it."""
    if value is None:
        return None
    rounded = float(f"{value:.5g}")
    return int(rounded) if abs(rounded) < 1e15 and rounded == int(rounded) else rounded
