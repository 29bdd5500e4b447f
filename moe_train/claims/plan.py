"""From a claim and a scale to runs, each named by its configuration's hash, and what is refused before any of them.

A run is what `train.py OVERRIDES seed=S stop.tokens=T optimizer.lr=R` makes. Its hash names its folder, so arms that
several claims share are trained once. An arm is composed once by hydra; seed, budget and rate are then set in the
checked configuration, which gives the same hash as the command line. An arm that starts from another has that arm's run
of the same seed and budget to begin with (starts.py).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_train.claims.library import Claim
from moe_train.compose import compose_run, key_of, quoted
from moe_train.config import Purpose, RunConfig, differences, model_digest, to_dict
from moe_train.config.claim import ScaleConfig, ScaleName
from moe_train.cost.flops import parameter_counts, training_flops_per_token
from moe_train.errors import UserError

TUNING_SEED = 1_000_000  # a rate is not chosen on the runs it is then judged by
RUNS, STARTS, DEFAULT_OUT = "runs", "starts", Path("outputs/claims")  # in a suite's folder, and that one
MIN_STEPS = 10  # with fewer a schedule cannot warm up, hold and anneal
ALLOWED = ("tracking", "hardware", "cost", "data", "num_threads")  # settings a user may give for all arms


@dataclass(frozen=True)
class Arm:
    """`overrides`: everything that makes its runs but seed, budget and rate. `config`: of any seed and budget."""

    name: str
    overrides: tuple[str, ...]
    config: RunConfig
    seed_offset: int
    vocab_size: int

    @property
    def is_dense(self) -> bool:
        return self.config.model.resolved().moe is None

    @cached_property
    def flops_per_token(self) -> float:
        return training_flops_per_token(self.config.model.resolved(), self.config.data.sequence_length, self.vocab_size)

    @cached_property
    def figures(self) -> dict[str, float]:
        counts = parameter_counts(self.config.model, self.vocab_size)
        return {
            "total_params": counts.total,
            "active_params": counts.active,
            "flops_per_token": self.flops_per_token,
        }

    @property
    def rate(self) -> float:
        return self.config.optimizer.lr


@dataclass(frozen=True)
class PlannedRun:
    arm: str
    seed: int
    tokens: int
    rate: float
    purpose: Purpose
    overrides: tuple[str, ...]
    config: RunConfig
    flops: float  # its own, without those of its start
    budget: int  # which of the scale's budgets, from 0; of tuning −1
    start: PlannedRun | None = None  # whose weights it begins with

    @cached_property
    def hash(self) -> str:
        return self.config.config_hash()

    @property
    def label(self) -> str:
        kind = "tuning, " if self.purpose == "tuning" else ""
        return f"{self.arm} ({kind}seed {self.seed}, {self.tokens:,} tokens, lr {self.rate:.4g})"


@dataclass(frozen=True)
class Plan:
    """A claim at one scale, its arms composed."""

    claim: Claim
    scale_name: ScaleName
    arms: dict[str, Arm]
    given: tuple[str, ...]
    config_dir: Path | None
    out: Path  # the suite's folder

    @property
    def scale(self) -> ScaleConfig:
        return self.claim.config.scales[self.scale_name]

    def tuning_runs(self, grid: Sequence[float] = ()) -> list[PlannedRun]:
        """Every arm at every multiple of its rate: an equal allowance. Arms take turns.

        grid: the multiples, where they are no longer the claim's own (tuning.py). An arm that starts from another has
        that one's tuning run at the multiple nearest to 1 to begin with.
        """
        tuning = self.scale.tuning
        if tuning is None:
            return []
        usual = min(tuning.factors, key=lambda factor: abs(math.log(factor)))
        rates = {name: arm.rate * usual for name, arm in self.arms.items()}
        return [
            self._run(arm, TUNING_SEED + seed, tuning.tokens, rates | {arm.name: arm.rate * factor}, "tuning", -1)
            for seed in range(tuning.seeds)
            for factor in grid or tuning.factors
            for arm in self.arms.values()
        ]

    def runs(self, rates: dict[str, float]) -> list[PlannedRun]:
        """What the statistics are of: by seed, then budget, then arm, so that a drifting machine favours none."""
        return [
            self._run(arm, seed, tokens, rates, "seed", budget)
            for seed in range(self.scale.first_seed, self.scale.first_seed + self.scale.seeds)
            for budget, tokens in enumerate(self.scale.tokens)
            for arm in self.arms.values()
        ]

    def untuned(self) -> dict[str, float]:
        return {name: arm.rate for name, arm in self.arms.items()}

    def _run(
        self, arm: Arm, seed: int, tokens: int, rates: dict[str, float], purpose: Purpose, budget: int
    ) -> PlannedRun:
        """`seed` and `tokens`: those of the scale, before what the arm makes of them."""
        settings = self.claim.config.arms[arm.name]
        start = None
        if settings.starts_from is not None:
            start = self._run(self.arms[settings.starts_from], seed, tokens, rates, purpose, budget)
        if purpose == "seed":
            seed += arm.seed_offset
        if settings.flops_of is not None:
            tokens = round(tokens * self._flops_per_token(settings.flops_of) / arm.flops_per_token)
        rate = float(f"{rates[arm.name]:.6g}")
        config = dataclasses.replace(
            arm.config,
            seed=seed,
            stop=dataclasses.replace(arm.config.stop, tokens=tokens),
            optimizer=dataclasses.replace(arm.config.optimizer, lr=rate),
        )
        own = [f"seed={seed}", f"stop.tokens={tokens}", f"optimizer.lr={rate!r}"]
        if start is not None:
            place = self._weights_of(start, arm, seed)
            config = dataclasses.replace(config, init_from=place)
            own.append(f"init_from={quoted(place)}")
        flops = tokens * arm.flops_per_token
        overrides = (*arm.overrides, *own)
        return PlannedRun(arm.name, seed, tokens, rate, purpose, overrides, config, flops, budget, start)

    def _flops_per_token(self, name: str) -> float:
        """Of an arm's own tokens, with those of the run it starts from, which has as many."""
        before = self.claim.config.arms[name].starts_from
        return self.arms[name].flops_per_token + (0.0 if before is None else self.arms[before].flops_per_token)

    def _weights_of(self, start: PlannedRun, arm: Arm, seed: int) -> str:
        """Where they are, as seen from where the suite runs: the run itself, or what upcycling makes of a dense one.

        Part of the run's hash, so that its command line makes the same run.
        """
        if self.upcycles(arm):
            place = self.out / STARTS / f"{start.hash}-{model_digest(arm.config.model)}-{seed}"
        else:
            place = self.out / RUNS / start.hash
        place = place.absolute()
        return str(place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place)

    def upcycles(self, arm: Arm) -> bool:
        """Whether it is a mixture that starts from a dense arm."""
        before = self.claim.config.arms[arm.name].starts_from
        return before is not None and self.arms[before].is_dense and not arm.is_dense


def make_plan(
    claim: Claim, scale_name: ScaleName, given: Sequence[str], config_dir: Path | None, out: Path = DEFAULT_OUT
) -> Plan:
    """Compose every arm and refuse what would not be a fair test. Raises UserError with claim, arm and remedy."""
    scale = claim.config.scales[scale_name]
    where = f"claim={claim.name} scale={scale_name}"
    arms = {}
    for name in claim.config.arms_at(scale_name):
        settings = claim.config.arms[name]
        extra = (scale.arms or {}).get(name, ())
        for override in (*settings.overrides, *extra):
            if (key := key_of(override)) in {key_of(each) for each in given}:
                raise UserError(f"{where}: arm {name} sets {key} itself ({override}): leave it out of the command")
        overrides = (*claim.config.base, *scale.overrides, *settings.overrides, *extra, *given)
        for override in overrides:
            key = key_of(override)
            if key in ("seed", "run_dir", "resume", "name", "init_from") or key.split(".")[0] in ("stop", "budget"):
                raise UserError(f"{where}: {override} is set by the suite itself: leave it out of arm {name}")
        try:
            config = compose_run(list(overrides), claim.name, config_dir)
        except UserError as error:
            raise UserError(f"{where}, arm {name}: {error}") from None
        arms[name] = Arm(name, overrides, config, settings.seed_offset, config.vocab_size)
    plan = Plan(claim, scale_name, arms, tuple(given), config_dir, out)
    for first, second in claim.config.pairs_at(scale_name):
        _check_pair(plan, arms[first], arms[second], where)
    _check_measures(plan, where)
    _check_names(plan, where)
    rates = {name: arm.rate for name, arm in arms.items()}
    if scale.tuning is not None and scale.tuning.together and len(set(rates.values())) > 1:
        said = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        raise UserError(
            f"{where}: tuning.together gives all arms one rate, and theirs differ ({said}): make them equal"
        )
    for run in [*plan.tuning_runs(), *plan.runs(plan.untuned())]:
        steps = run.tokens / (run.config.batch_size * run.config.data.sequence_length)
        if steps < MIN_STEPS:
            raise UserError(
                f"{where}: {run.tokens:,} tokens are {steps:.0f} steps of arm {run.arm}, and a schedule needs "
                f"{MIN_STEPS}: raise tokens, or lower batch_size"
            )
    return plan


def _check_measures(plan: Plan, where: str) -> None:
    """That arms have what is measured of them, before they are trained."""
    for comparison in plan.claim.config.at(plan.scale_name):
        for name in comparison.arms:
            arm = plan.arms[name]
            if comparison.measure == "max_violation" and arm.is_dense:
                raise UserError(f"{where}: max_violation of arm {name}, which has no experts: measure something else")
            if comparison.measure == "generation_speed_up" and arm.config.model.mtp is None:
                raise UserError(f"{where}: generation_speed_up of arm {name}, which has no MTP module to draft with")


def _check_names(plan: Plan, where: str) -> None:
    """That what may vary is a setting of an arm, or a group of them."""
    known = {key for arm in plan.arms.values() for key in _keys(to_dict(arm.config))}
    for name in plan.claim.config.varies:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else "leave it out"
            raise UserError(f"{where}: varies names {name}, which no arm has: {hint}")


def _keys(settings: Any, prefix: str = "") -> Iterator[str]:
    """Of settings and of groups of them, with dots."""
    for key, value in settings.items() if isinstance(settings, dict) else ():
        yield f"{prefix}{key}"
        yield from _keys(value, f"{prefix}{key}.")


_OF_THE_SAME_TEXT = ("data.sequence_length", "data.cache_dir")  # settings of data that leave the text as it is


def _check_pair(plan: Plan, first: Arm, second: Arm, where: str) -> None:
    """They may differ in what the claim says, and must be equal where it says so."""
    varies = plan.claim.config.varies
    same = first.config.config_hash() == second.config.config_hash() and first.seed_offset == second.seed_offset
    settings = plan.claim.config.arms
    if same and settings[first.name].rests_on == settings[second.name].rests_on:
        raise UserError(
            f"{where}: arms {first.name} and {second.name} are the same runs, and would differ in nothing: give them "
            "other settings, or one of them a seed_offset"
        )
    # Threads, prices, kernels and checkpoints as well: they change what a run takes, if not what it learns.
    for key, one, other in differences(to_dict(first.config), to_dict(second.config)):
        if not any(key == prefix or key.startswith(f"{prefix}.") for prefix in varies):
            raise UserError(
                f"{where}: arms {first.name} and {second.name} differ in {key} ({one} and {other}), which the claim "
                "does not say: make them equal, or name it under varies"
            )
        if key == "eval.max_tokens" or (key.startswith("data.") and key not in _OF_THE_SAME_TEXT):
            raise UserError(
                f"{where}: arms {first.name} and {second.name} differ in {key} ({one} and {other}), and losses on "
                "other text cannot be compared: make them equal"
            )
    for figure, tolerance in plan.claim.config.equal.items():
        one, other = first.figures[figure], second.figures[figure]
        if abs(one / other - 1) > tolerance:
            raise UserError(
                f"{where}: {figure} of arms {first.name} and {second.name} are {one:,.0f} and {other:,.0f}, further "
                f"apart than the {tolerance:.1%} that equal allows: change their sizes"
            )
