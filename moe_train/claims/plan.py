"""From a claim and a scale to runs, each named by its configuration's hash, and what is refused before any of them.

A run is what `train.py OVERRIDES seed=S stop.tokens=T optimizer.lr=R` makes. Its hash names its folder, so arms that
several claims share are trained once. An arm is composed once by hydra; seed, budget and rate are then set in the
checked configuration, which gives the same hash as the command line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moe_train.claims.library import Claim
from moe_train.compose import compose_run
from moe_train.config import Purpose, RunConfig, differences
from moe_train.config.claim import ScaleConfig, ScaleName
from moe_train.cost.flops import parameter_counts, training_flops_per_token
from moe_train.errors import UserError

TUNING_SEED = 1_000_000  # a rate is not chosen on the runs it is then judged by
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
    flops: float
    budget: int  # which of the scale's budgets, from 0; of tuning −1

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

    @property
    def scale(self) -> ScaleConfig:
        return self.claim.config.scales[self.scale_name]

    def tuning_runs(self) -> list[PlannedRun]:
        """Every arm at every multiple of its rate: an equal allowance. Arms take turns."""
        tuning = self.scale.tuning
        if tuning is None:
            return []
        return [
            self._run(arm, TUNING_SEED + seed, tuning.tokens, arm.rate * factor, "tuning", -1)
            for seed in range(tuning.seeds)
            for factor in tuning.factors
            for arm in self.arms.values()
        ]

    def runs(self, rates: dict[str, float]) -> list[PlannedRun]:
        """What the statistics are of: by seed, then budget, then arm, so that a drifting machine favours none."""
        return [
            self._run(arm, seed + arm.seed_offset, tokens, rates[arm.name], "seed", budget)
            for seed in range(self.scale.seeds)
            for budget, tokens in enumerate(self.scale.tokens)
            for arm in self.arms.values()
        ]

    def untuned(self) -> dict[str, float]:
        return {name: arm.rate for name, arm in self.arms.items()}

    def _run(self, arm: Arm, seed: int, tokens: int, rate: float, purpose: Purpose, budget: int) -> PlannedRun:
        reference = self.claim.config.arms[arm.name].flops_of
        if reference is not None:
            tokens = round(tokens * self.arms[reference].flops_per_token / arm.flops_per_token)
        rate = float(f"{rate:.6g}")
        config = dataclasses.replace(
            arm.config,
            seed=seed,
            stop=dataclasses.replace(arm.config.stop, tokens=tokens),
            optimizer=dataclasses.replace(arm.config.optimizer, lr=rate),
        )
        own = (f"seed={seed}", f"stop.tokens={tokens}", f"optimizer.lr={rate!r}")
        flops = tokens * arm.flops_per_token
        return PlannedRun(arm.name, seed, tokens, rate, purpose, (*arm.overrides, *own), config, flops, budget)


def make_plan(claim: Claim, scale_name: ScaleName, given: Sequence[str], config_dir: Path | None) -> Plan:
    """Compose every arm and refuse what would not be a fair test. Raises UserError with claim, arm and remedy."""
    scale = claim.config.scales[scale_name]
    where = f"claim={claim.name} scale={scale_name}"
    arms = {}
    for name in claim.config.arms_at(scale_name):
        settings = claim.config.arms[name]
        extra = (scale.arms or {}).get(name, ())
        overrides = (*claim.config.base, *scale.overrides, *settings.overrides, *extra, *given)
        for override in overrides:
            key = override.lstrip("+~").partition("=")[0]
            if key in ("seed", "run_dir", "resume", "name", "init_from") or key.split(".")[0] in ("stop", "budget"):
                raise UserError(f"{where}: {override} is set by the suite itself: leave it out of arm {name}")
        try:
            config = compose_run(list(overrides), claim.name, config_dir)
        except UserError as error:
            raise UserError(f"{where}, arm {name}: {error}") from None
        arms[name] = Arm(name, overrides, config, settings.seed_offset, _vocabulary(config))
    plan = Plan(claim, scale_name, arms, tuple(given), config_dir)
    for first, second in claim.config.pairs_at(scale_name):
        _check_pair(plan, arms[first], arms[second], where)
    for run in [*plan.tuning_runs(), *plan.runs(plan.untuned())]:
        steps = run.tokens / (run.config.batch_size * run.config.data.sequence_length)
        if steps < MIN_STEPS:
            raise UserError(
                f"{where}: {run.tokens:,} tokens are {steps:.0f} steps of arm {run.arm}, and a schedule needs "
                f"{MIN_STEPS}: raise tokens, or lower batch_size"
            )
    return plan


def _check_pair(plan: Plan, first: Arm, second: Arm, where: str) -> None:
    """They may differ in what the claim says, and must be equal where it says so."""
    varies = plan.claim.config.varies
    for key, one, other in differences(first.config.identity(), second.config.identity()):
        if not any(key == prefix or key.startswith(f"{prefix}.") for prefix in varies):
            raise UserError(
                f"{where}: arms {first.name} and {second.name} differ in {key} ({one} and {other}), which the claim "
                "does not say: make them equal, or name it under varies"
            )
    for figure, tolerance in plan.claim.config.equal.items():
        one, other = first.figures[figure], second.figures[figure]
        if abs(one / other - 1) > tolerance:
            raise UserError(
                f"{where}: {figure} of arms {first.name} and {second.name} are {one:,.0f} and {other:,.0f}, further "
                f"apart than the {tolerance:.1%} that equal allows: change their sizes"
            )


def _vocabulary(config: RunConfig) -> int:
    """Of the built model, as far as it is known before the tokenizer is: a BPE is trained to its full size."""
    size = 257 if config.data.tokenizer == "bytes" else config.data.vocab_size
    return config.model.vocab_size or -(-size // 64) * 64
