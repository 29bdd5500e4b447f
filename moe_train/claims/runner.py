"""Makes the runs of a suite with the pool of all sweeps, and says which are missing and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from moe_train.claims.plan import PlannedRun
from moe_train.claims.results import Folder
from moe_train.compose import quoted
from moe_train.cost.budget import Budget
from moe_train.launch import start_job
from moe_train.sweeps.board import Board
from moe_train.sweeps.devices import Devices
from moe_train.sweeps.job import Job, once
from moe_train.sweeps.pool import Pool
from moe_train.sweeps.running import Start


@dataclass
class Runner:
    """`jobs` at a time. `settings`: overrides of every job that are no identity."""

    folder: Folder
    budget: Budget
    jobs: int
    devices: Devices
    settings: Sequence[str] = ()
    config_dir: Path | None = None
    start: Start = start_job
    console: Console | None = None

    def make(self, runs: Sequence[PlannedRun], claim: str, arms_of: Mapping[str, Sequence[str]]) -> list[str]:
        """Make those of `runs` that are not finished, in their order; returns why some are missing, a line each.

        arms_of: the names under which each hash is known, for its tags in wandb. Raises Interrupted.
        """
        jobs = once(self._job(run, claim, arms_of.get(run.hash, (run.arm,))) for run in runs)
        pool = Pool(
            *(self.folder.runs, self.budget, self.jobs, self.devices),
            settings=self.settings,
            config_dir=self.config_dir,
            start=self.start,
            board=Board(len(jobs), self.console),
        )
        made = pool.make(jobs)
        made.raise_if_interrupted()
        labels = {run.hash: run.label for run in runs}
        missing = [
            f"{labels[each.job.hash]} ended with exit status {each.exit_status}: {each.says} (runs/{each.job.hash}.log)"
            for each in made.outcomes
            if not each.has_result
        ]
        if made.stopped is not None:
            left = len(jobs) - len(made.outcomes)
            missing.append(f"{made.stopped}: {left} of {len(jobs)} runs were not started")
        return missing

    def _job(self, run: PlannedRun, claim: str, tags: Sequence[str]) -> Job:
        settings = (
            f"name={claim}-{run.arm}-{run.seed}",
            f"cost.claim={claim}",
            f"cost.purpose={run.purpose}",
            f"cost.sweep={quoted(self.budget.sweep)}",
            f"tracking.group={claim}",
            f"tracking.tags=[{','.join(dict.fromkeys([*tags, run.purpose]))}]",
        )
        return Job(f"{claim}: {run.label}", run.overrides, run.config, settings)
