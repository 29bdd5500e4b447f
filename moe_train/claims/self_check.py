"""`self_check=true`: whether the statistics keep what they promise, on suites that are made up and on real seeds.

Identical arms must not differ, and effects at the very edge of a margin must not count, more often than alpha says;
planted effects must be found as often as the power statement says; planted bugs must be caught before any statistic is
computed. Thousands of simulated suites go through the code that judges real ones. Last, where the claim
`identical_arms` was made, its real losses are put through the same test under all ways of dealing them to two arms.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from moe_train.claims import record
from moe_train.claims.curves import saving
from moe_train.claims.library import load_claims
from moe_train.claims.made_up import PRICE, write_run
from moe_train.claims.plan import Plan, make_plan
from moe_train.claims.results import Folder
from moe_train.claims.statistics import Mean, detectable, holm, p_values, power
from moe_train.claims.verdict import judge
from moe_train.config.claim import Kind

ALPHA, SIGMA = 0.05, 0.01
SUITES, CURVE_SUITES, DRAWS = 10_000, 1_000, 500
SEEDS = (3, 5)
IDENTICAL, SPOILT = "identical_arms", "dropping_tokens"  # the claims that are looked at, and made up with a bug


@dataclass(frozen=True)
class Check:
    """`rate` must lie within `wanted`; simulated ones may exceed it by three standard errors, which are in it."""

    what: str
    rate: float | None
    low: float
    high: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.rate is None or self.low <= self.rate <= self.high


def run(out: Path) -> list[Check]:
    """All checks, shown; the caller decides what a failed one means."""
    checks = [*false_positives(), *planted_effects(), *curves(), *planted_bugs(), *real_seeds(out)]
    table = Table(title="self-check of the claims", title_justify="left")
    for column in ("check", "rate", "allowed", "passed", "note"):
        table.add_column(column, overflow="fold")
    for check in checks:
        rate = "not made" if check.rate is None else f"{check.rate:.3f}"
        allowed = f"{check.low:.3f} to {check.high:.3f}"
        passed = "–" if check.rate is None else "yes" if check.passed else "NO"
        table.add_row(check.what, rate, allowed, passed, check.note)
    Console().print(table)
    return checks


def _error(rate: float, suites: int) -> float:
    return 3 * float(np.sqrt(rate * (1 - rate) / suites))


def _at_most(what: str, rate: float, suites: int) -> Check:
    return Check(what, rate, 0.0, ALPHA + _error(ALPHA, suites), f"{suites:,} suites")


def _near(what: str, rate: float, wanted: float, suites: int) -> Check:
    return Check(what, rate, wanted - _error(wanted, suites), wanted + _error(wanted, suites), f"{suites:,} suites")


def _differences(seeds: int, effect: float, suites: int, random: np.random.Generator) -> Mean:
    """Paired arms: what a seed has in common drops out, what remains scatters by SIGMA."""
    common = random.normal(0, 3 * SIGMA, (suites, seeds))
    arm = common + effect + random.normal(0, SIGMA / np.sqrt(2), (suites, seeds))
    against = common + random.normal(0, SIGMA / np.sqrt(2), (suites, seeds))
    return Mean.of(arm - against)


def false_positives() -> list[Check]:
    """At the edge of the null hypotheses, where mistakes are likeliest."""
    random = np.random.default_rng(0)
    checks = []
    edges: list[tuple[Kind, float, float]] = [
        ("superiority", 0.0, 0.0),
        ("superiority", 0.01, -0.01),
        ("non_inferiority", 0.01, 0.01),
        ("tost", 0.02, 0.02),
    ]
    for seeds in SEEDS:
        same = _differences(seeds, 0.0, SUITES, random)
        rate = float((same.p_difference() <= ALPHA).mean())
        checks.append(_at_most(f"identical arms differ, {seeds} seeds", rate, SUITES))
        for kind, margin, effect in edges:
            mean = _differences(seeds, effect, SUITES, random)
            for word, p in zip(("supported", "refuted"), p_values(mean, kind, margin)):
                rate = float((p <= ALPHA).mean())
                checks.append(_at_most(f"{kind} at its margin {margin:g} is {word}, {seeds} seeds", rate, SUITES))
    p = np.stack([p_values(_differences(5, 0.0, SUITES, random), "superiority", 0.0)[0] for _ in range(4)], -1)
    any_of_four = float((holm(p) <= ALPHA).any(-1).mean())
    return [*checks, _at_most("any of four comparisons of identical arms, Holm, 5 seeds", any_of_four, SUITES)]


def planted_effects() -> list[Check]:
    random = np.random.default_rng(1)
    checks = []
    for seeds in SEEDS:
        beyond = detectable(SIGMA, seeds, ALPHA)
        mean = _differences(seeds, -0.01 - beyond, SUITES, random)
        rate = float((p_values(mean, "superiority", 0.01)[0] <= ALPHA).mean())
        checks.append(_near(f"a planted effect of the stated size is found, {seeds} seeds", rate, 0.8, SUITES))
        for margin in (0.02, 0.03):
            rate = float((p_values(_differences(seeds, 0.0, SUITES, random), "tost", margin)[0] <= ALPHA).mean())
            wanted = power("tost", margin, 0.0, SIGMA, seeds, ALPHA)
            what = f"identical arms are equivalent within ±{margin:g}, {seeds} seeds"
            checks.append(_near(what, rate, wanted, SUITES))
    return checks


def curves() -> list[Check]:
    """Cost to target: an arm that takes 1.5 times less is not found above 1.5 too often, one of 2.5 is found."""
    budgets = np.array([0.33, 0.5, 0.7, 1.0]) * 1e6
    random = np.random.default_rng(2)

    def supported(ratio: float) -> float:
        found = 0
        for suite in range(CURVE_SUITES):
            common = random.normal(0, SIGMA, (3, 1))
            losses = []
            for faster in (ratio, 1.0):
                loss = 1.2 + 0.9 * (budgets * faster / 1e6) ** -0.35
                losses.append(loss + common + random.normal(0, SIGMA / 2, (3, 4)))
            found += saving(budgets, losses[0], budgets, losses[1], draws=DRAWS, seed=suite).p_values(1.5)[0] <= ALPHA
        return found / CURVE_SUITES

    at_the_edge = _at_most("a cost ratio of 1.5 is found above 1.5, 3 seeds", supported(1.5), CURVE_SUITES)
    rate = supported(2.5)
    return [at_the_edge, Check("a planted cost ratio of 2.5 is found above 1.5, 3 seeds", rate, 0.8, 1.0)]


# ---------------------------------------------------------------------------------------------------- planted bugs


def planted_bugs() -> list[Check]:
    """A suite of made-up runs whose arms differ by far, one of which was not what it should have been."""
    (claim,) = load_claims(SPOILT, "smoke", None)
    plan = make_plan(claim, "smoke", (), None)
    bugs: dict[str, dict[str, Any]] = {
        "other text": {"changed": {"corpus_fingerprint": "f" * 32}},
        "another number of tokens": {"changed": {"tokens": 1}},
        "part of the validation text": {"changed": {"val_tokens": 100}},
        "another configuration": {"trained": "batch_size"},
        "another order of the data": {"order": True},
    }
    checks = []
    for bug, how in bugs.items():
        with tempfile.TemporaryDirectory() as folder:
            caught = _is_caught(plan, Folder(Path(folder)), how)
        checks.append(Check(f"an arm with {bug} is caught", float(caught), 1.0, 1.0))
    with tempfile.TemporaryDirectory() as folder:
        caught = _price_is_caught(plan, Folder(Path(folder)))
    return [*checks, Check("an arm at another price is caught", float(caught), 1.0, 1.0)]


def _made_up_suite(plan: Plan, folder: Folder, how: dict[str, Any]) -> Any:
    runs = plan.runs(plan.untuned())
    spoilt = runs[-1]
    for run in runs:
        own: dict[str, Any] = dict(how) if run is spoilt else {}
        if "trained" in own:
            own["trained"] = dataclasses.replace(run.config, batch_size=2 * run.config.batch_size)
        if "order" in own:
            own["order"] = range(100, 10_000)
        loss = 2.0 + 0.001 * run.seed + (1.0 if run.arm == spoilt.arm else 0.0)
        write_run(plan.arms[run.arm], run, folder, loss, **own)
    return judge(plan, folder, [], runs, plan.untuned(), [])


def _is_caught(plan: Plan, folder: Folder, how: dict[str, Any]) -> bool:
    judged = _made_up_suite(plan, folder, how)
    looked = any(compared.effect is not None for compared in judged.comparisons)
    return judged.verdict == "inconclusive" and bool(judged.reasons) and not looked


def _price_is_caught(plan: Plan, folder: Folder) -> bool:
    """Losses may be compared, dollars and seconds not."""
    judged = _made_up_suite(plan, folder, {"changed": {"price_usd_per_hour": 2 * PRICE}})
    unpriced = all(saved.axes["usd"] is None and saved.axes["seconds"] is None for saved in judged.axes)
    return not judged.reasons and unpriced and any("another price" in note for note in judged.notes)


# ------------------------------------------------------------------------------------------------------ real seeds


def real_seeds(out: Path) -> list[Check]:
    """Of every scale at which the claim identical_arms was made here."""
    path = out / record.JSON
    entries = record.read(path)["claims"] if path.exists() else []
    made = [entry for entry in entries if entry["claim"] == IDENTICAL and entry["comparisons"][0]["values"]]
    if not made:
        note = f"make it with claim={IDENTICAL}"
        return [Check("identical arms of real runs", None, 0.0, ALPHA, note)]
    checks = []
    for entry in made:
        scale, (first, second) = entry["scale"], entry["comparisons"][0]["values"].values()
        rate, ways = share_of_deals_that_differ([*first, *second])
        checks.append(Check(f"real losses dealt to two arms differ, scale={scale}", rate, 0.0, 0.1, f"{ways} ways"))
        verdict = entry["comparisons"][0]["verdict"]
        checks.append(
            Check(f"real identical arms are refuted, scale={scale}", float(verdict == "refuted"), 0.0, 0.0, verdict)
        )
    return checks


def share_of_deals_that_differ(losses: Sequence[float]) -> tuple[float, int]:
    """Of all ways to deal the losses to two arms of equal size: how many differ at ALPHA, and how many there are.

    A handful of ways is a coarse measure of 5%, so up to a tenth is let pass.
    """
    count = len(losses)
    deals = list(itertools.combinations(range(count), count // 2))
    x = np.asarray(losses)
    ones = np.array([[x[i] for i in deal] for deal in deals])
    others = np.array([[x[i] for i in range(count) if i not in deal] for deal in deals])
    return float((Mean.of_difference(ones, others).p_difference() <= ALPHA).mean()), len(deals)
