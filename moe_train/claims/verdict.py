"""From finished runs to verdicts: first whether they may be looked at, then each comparison, then the claim.

The number of seeds is fixed beforehand, so there is no looking early: as long as a planned run is missing, or one is
not what was planned, the verdict is `inconclusive` and no statistic is computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from moe_train.claims import integrity, measures
from moe_train.claims.axes import SavedOnAxes, losses_by_budget, price_ratio, saved_on_axes
from moe_train.claims.curves import saving
from moe_train.claims.notes import notes_on
from moe_train.claims.plan import Plan, PlannedRun
from moe_train.claims.results import Folder, Result
from moe_train.claims.rules import Verdict, verdict_by, verdict_of
from moe_train.claims.statements import power_statement, statement
from moe_train.claims.statistics import Array, Mean, holm, p_values
from moe_train.config.claim import TIMED, TO_TARGET, ComparisonConfig
from moe_train.errors import UserError


@dataclass
class Compared:
    """A comparison and what came of it. p values are Holm's, over the family of deciding ones or of the others."""

    name: str
    arm: str
    against: str | None
    paired: bool
    measure: str
    unit: str
    statement: str
    decides: bool
    verdict: Verdict
    effect: float | None = None
    interval: tuple[float, float | None] | None = None  # None: nothing bounds it from above
    level: float | None = None
    bound: str | None = None
    p_supported: float | None = None
    p_refuted: float | None = None
    p_difference: float | None = None  # two-sided, unadjusted, against no difference at all
    values: dict[str, list[float]] = field(default_factory=dict)  # by arm, in order of seeds
    sigma: float | None = None  # standard deviation between seeds (of pairs), measured
    power: str = ""
    reason: str | None = None  # why nothing was computed


@dataclass
class Judged:
    """A claim at a scale with everything the report needs."""

    plan: Plan
    verdict: Verdict
    comparisons: list[Compared]
    reasons: list[str]  # why it could not be looked at
    notes: list[str]
    axes: list[SavedOnAxes]
    tuning: list[Result]
    results: list[Result]
    planned: int  # runs, tuning included, each once
    made: int  # of them; those that diverged while tuning count
    rates: dict[str, float]
    usd: float | None
    usd_tuning: float | None
    p_supported: float | None

    @property
    def main(self) -> Compared:
        """The first that decides: its effect stands in the table."""
        return next(compared for compared in self.comparisons if compared.decides)


def judge(
    plan: Plan,
    folder: Folder,
    tuning: Sequence[PlannedRun],
    runs: Sequence[PlannedRun],
    rates: dict[str, float],
    missing: Sequence[str],
) -> Judged:
    """`missing`: what the runner says of runs that did not finish."""
    tuned, damaged = folder.results(tuning)
    results, others = folder.results(runs)
    incomplete = not runs or len(results) < len(runs)
    reasons = list(dict.fromkeys([*damaged, *others, *missing])) if incomplete else []
    diverged = [run for run in tuning if folder.diverged(run) is not None]
    planned = len({run.hash for run in [*tuning, *(runs or plan.runs(plan.untuned()))]})
    made = len({run.hash for run in [*(result.run for result in [*tuned, *results]), *diverged]})
    if incomplete:
        reasons.insert(0, f"{made} of {planned} planned runs are there: nothing is computed before all are")
    reasons += integrity.problems(plan, results, tuned)
    left_out = integrity.not_comparable(results)
    which = "seconds and dollars" if "seconds" in left_out else "dollars"
    notes = [f"{which} are not compared: {left_out['usd']}"] if left_out else []
    notes += [f"{run.label} diverged, and so that rate has lost" for run in diverged]
    comparisons = [_blank(plan, config) for config in plan.claim.config.at(plan.scale_name)]
    axes: list[SavedOnAxes] = []
    if not reasons:
        for compared, config in zip(comparisons, plan.claim.config.at(plan.scale_name)):
            why_not = left_out.get("usd" if config.measure == "usd_to_target" else "seconds")
            if config.measure in TIMED and why_not is not None:
                compared.reason = why_not
                continue
            try:
                _compute(compared, config, plan, results, folder)
            except UserError as error:
                compared.reason = str(error)
        _decide(comparisons, plan)
        axes = saved_on_axes(plan, results, without=left_out)
        notes += notes_on(plan, results, rates, folder)
    deciding = [compared for compared in comparisons if compared.decides]
    known = [compared.p_supported for compared in deciding if compared.p_supported is not None]
    return Judged(
        plan=plan,
        verdict=verdict_of(plan.scale_name, [compared.verdict for compared in deciding]),
        comparisons=comparisons,
        reasons=reasons,
        notes=notes,
        axes=axes,
        tuning=tuned,
        results=results,
        planned=planned,
        made=made,
        rates=rates,
        usd=_dollars(folder, [*tuning, *runs]),
        usd_tuning=_dollars(folder, tuning),
        p_supported=max(known) if len(known) == len(deciding) else None,
    )


def _blank(plan: Plan, config: ComparisonConfig) -> Compared:
    unit = measures.UNITS[config.measure]
    if config.test.relative:
        unit = "log ratio"
    elif config.test.kind == "ratio_above" and config.measure not in TO_TARGET:
        unit = "times"
    return Compared(
        name=config.name,
        arm=config.arm,
        against=config.against,
        paired=config.paired,
        measure=config.measure,
        unit=unit,
        statement=statement(config),
        decides=config.decides,
        verdict="inconclusive",
        power=power_statement(plan, config),
    )


# ------------------------------------------------------------------------------------------------- one comparison


def _of_arm(results: Sequence[Result], arm: str, budget: int) -> list[Result]:
    """One a seed, in the order of seeds."""
    found = [r for r in results if r.run.arm == arm and r.run.budget == budget]
    return sorted(found, key=lambda result: result.run.seed)


def _compute(
    compared: Compared, config: ComparisonConfig, plan: Plan, results: Sequence[Result], folder: Folder
) -> None:
    last, test = len(plan.scale.tokens) - 1, config.test
    level = compared.level = 1 - 2 * test.alpha
    if config.measure in TO_TARGET:
        assert config.against is not None  # ratio_above has one
        found = saving(
            *losses_by_budget(plan, results, config.arm),
            *losses_by_budget(plan, results, config.against),
            price_ratio(config.measure.removesuffix("_to_target"), plan, results, config.arm, config.against),
        )
        compared.effect, compared.interval, compared.bound = found.ratio, found.interval(level), found.bound
        compared.p_supported, compared.p_refuted = found.p_values(test.margin)
        compared.p_difference = min(1.0, 2 * min(found.p_values(1.0)))
        return
    for arm in config.arms:
        compared.values[arm] = [
            measures.value(config.measure, result, folder, plan.config_dir) for result in _of_arm(results, arm, last)
        ]
    own = np.array(compared.values[config.arm])
    logs = test.relative or test.kind == "ratio_above"
    if logs and min(itertools.chain(*compared.values.values())) <= 0:
        raise UserError(f"{config.measure} is not above 0 in every run: a ratio of it says nothing")
    if config.against is None:
        mean, scatter = Mean.of(own), own.std(ddof=1)
    else:
        other = np.array(compared.values[config.against])
        first, second = (np.log(own), np.log(other)) if logs else (own, other)
        if test.kind == "ratio_above":
            first, second = second, first
        mean = Mean.of(first - second) if config.paired else Mean.of_difference(first, second)
        scatter = (
            (first - second).std(ddof=1) if config.paired else np.sqrt((first.var(ddof=1) + second.var(ddof=1)) / 2)
        )
    supported, refuted = p_values(mean, test.kind, test.margin)
    low, high = mean.interval(level)
    effect: Array = mean.value
    if test.kind == "ratio_above":
        effect, low, high = np.exp(effect), np.exp(low), np.exp(high)
    compared.effect, compared.interval = float(effect), (float(low), float(high))
    compared.p_supported, compared.p_refuted = float(supported), float(refuted)
    if config.against is not None:
        compared.p_difference = float(mean.p_difference())
    compared.sigma = float(scatter)
    compared.power += f"; as measured, {power_statement(plan, config, compared.sigma)}"


def _decide(comparisons: Sequence[Compared], plan: Plan) -> None:
    """Holm within the deciding comparisons and within the others; one that could not be computed counts as p = 1."""
    alphas = [config.test.alpha for config in plan.claim.config.at(plan.scale_name)]
    for decides, chosen in itertools.product((True, False), ("p_supported", "p_refuted")):
        family = [compared for compared in comparisons if compared.decides == decides]
        if not family:
            continue
        known = [getattr(compared, chosen) for compared in family]
        for compared, adjusted in zip(family, holm([1.0 if p is None else p for p in known])):
            if getattr(compared, chosen) is not None:
                setattr(compared, chosen, float(adjusted))
    for compared, alpha in zip(comparisons, alphas):
        found = verdict_by(compared.p_supported, compared.p_refuted, alpha)
        compared.verdict = "inconclusive" if plan.scale_name == "smoke" else found  # which decides nothing


# -------------------------------------------------------------------------------------------------- round about it


def _dollars(folder: Folder, runs: Sequence[PlannedRun]) -> float | None:
    known = [folder.spent(run) for run in {run.hash: run for run in runs}.values()]
    return None if any(usd is None for usd in known) else sum(usd or 0.0 for usd in known)
