"""What the trials of a search came to: settings with their figures, averaged over seeds, and which none is better than.

A seed that is searched over is no setting to be chosen: runs that differ in it alone are one point.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from moe_train.search.study import Study

SEED = "seed"


@dataclass(frozen=True)
class Point:
    """`values`: the objectives, in their order; `spread`: largest less smallest of the first over the seeds."""

    level: dict[str, Any]
    params: dict[str, Any]
    values: tuple[float, ...]
    spread: float | None  # None of a single run
    figures: dict[str, float]
    runs: tuple[str, ...]  # hashes

    def number(self, name: str) -> float | None:
        """A setting or figure by name, where it is a number."""
        found = {**self.figures, **self.level, **self.params}.get(name)
        return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def points_of(study: Study) -> list[Point]:
    """The best first, by the first objective."""
    groups: dict[str, list[FrozenTrial]] = {}
    for trial in study.trials(TrialState.COMPLETE):
        settings = {key: value for key, value in trial.params.items() if key != SEED}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(trial)
    found = [_point(study, trials) for trials in groups.values()]
    return sorted(found, key=lambda point: point.values)


def _point(study: Study, trials: Sequence[FrozenTrial]) -> Point:
    runs = {str(trial.user_attrs.get("hash")): trial for trial in trials}  # a run that was suggested twice counts once
    first = [trial.values[0] for trial in runs.values()]
    names = set.intersection(*(set(trial.user_attrs.get("figures", {})) for trial in runs.values()))
    return Point(
        level=study.definition.level,
        params={key: value for key, value in trials[0].params.items() if key != SEED},
        values=tuple(statistics.fmean(values) for values in zip(*(trial.values for trial in runs.values()))),
        spread=max(first) - min(first) if len(first) > 1 else None,
        figures={n: statistics.fmean(trial.user_attrs["figures"][n] for trial in runs.values()) for n in names},
        runs=tuple(runs),
    )


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other is better than in one objective and no worse in the others, by the last objective."""

    def beats(one: Point, other: Point) -> bool:
        return one.values != other.values and all(a <= b for a, b in zip(one.values, other.values))

    best = [point for point in points if not any(beats(other, point) for other in points)]
    return sorted(best, key=lambda point: point.values[::-1])


@dataclass(frozen=True)
class Without:
    """Trials that came to nothing, by why."""

    pruned: int
    failed: int
    going: int
    reasons: tuple[str, ...]  # of failures, each once


def without_result(study: Study) -> Without:
    made = [trial.params for trial in study.trials(TrialState.COMPLETE)]
    failed = [trial for trial in study.trials(TrialState.FAIL) if trial.params not in made]  # but for another try
    reasons = dict.fromkeys(str(trial.user_attrs.get("says", "no reason is known")) for trial in failed)
    return Without(
        pruned=len(study.trials(TrialState.PRUNED)),
        failed=len(failed),
        going=len(study.trials(TrialState.RUNNING)),
        reasons=tuple(reasons),
    )
