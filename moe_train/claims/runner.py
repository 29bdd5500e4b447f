"""Makes the runs of a suite with the pool of all sweeps, and says which are missing and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from moe_train.claims import starts
from moe_train.claims.plan import PlannedRun
from moe_train.claims.results import Folder
from moe_train.compose import quoted
from moe_train.cost.budget import Budget
from moe_train.errors import UserError
from moe_train.sweeps.board import Board
from moe_train.sweeps.devices import Devices
from moe_train.sweeps.job import Job, once
from moe_train.sweeps.pool import Pool
from moe_train.sweeps.running import Start


class _Ready:
    """Jobs in their order, but those whose start is not finished after the others. May have more when asked again.

    `refused`: by hash, why a run that is not there cannot begin although its start is finished.
    """

    def __init__(self, jobs: Sequence[Job], runs: Mapping[str, PlannedRun], folder: Folder) -> None:
        self.waiting, self.refused = list(jobs), dict[str, str]()
        self._runs, self._folder = runs, folder

    def __iter__(self) -> Iterator[Job]:
        return self

    def __next__(self) -> Job:
        for job in list(self.waiting):
            run = self._runs[job.hash]
            if not self._folder.is_finished(run):
                if run.start is not None and not self._folder.is_finished(run.start):
                    continue
                try:
                    starts.ensure(run, self._folder)
                except UserError as error:
                    self.refused[job.hash] = str(error)
                    self.waiting.remove(job)
                    continue
            self.waiting.remove(job)
            return job
        raise StopIteration


@dataclass
class Runner:
    """`jobs` at a time. `settings`: overrides of every job that are no identity."""

    folder: Folder
    budget: Budget
    jobs: int
    devices: Devices
    settings: Sequence[str] = ()
    config_dir: Path | None = None
    start: Start | None = None
    console: Console | None = None

    def make(self, runs: Sequence[PlannedRun], claim: str, arms_of: Mapping[str, Sequence[str]]) -> list[str]:
        """Make those of `runs` that are not finished, in their order; returns why some are missing, a line each.

        A run that starts from another waits for it. One that diverged is not made again: it would diverge again.
        arms_of: the names under which each hash is known, for its tags in wandb. Raises Interrupted.
        """
        by_hash = {run.hash: run for run in runs}
        diverged = {run.hash: says for run in runs if (says := self.folder.diverged(run)) is not None}
        wanted = [run for run in runs if run.hash not in diverged]
        jobs = once(self._job(run, claim, arms_of.get(run.hash, (run.arm,))) for run in wanted)
        ready = _Ready(jobs, by_hash, self.folder)
        pool = Pool(
            *(self.folder.runs, self.budget, self.jobs, self.devices),
            settings=self.settings,
            config_dir=self.config_dir,
            start=self.start,
            board=Board(len(jobs), self.console),
        )
        made = pool.make(ready)
        made.raise_if_interrupted()
        missing = [
            f"{by_hash[each].label} diverged ({says}): it is kept as a result, and made again only once "
            f"runs/{each}.log is removed"
            for each, says in diverged.items()
        ]
        missing += [
            f"{by_hash[each.job.hash].label} ended with exit status {each.exit_status}: {each.says} "
            f"(runs/{each.job.hash}.log{self._anew(each.job)})"
            for each in made.outcomes
            if not each.has_result
        ]
        missing += [f"{by_hash[each].label} cannot begin: {why}" for each, why in ready.refused.items()]
        if made.stopped is not None:
            left = len(jobs) - len(made.outcomes) - len(ready.refused)
            missing.append(f"{made.stopped}: {left} of {len(jobs)} runs were not started")
        elif ready.waiting:
            missing += [f"{by_hash[job.hash].label} has nothing to start from" for job in ready.waiting]
        return missing

    def _anew(self, job: Job) -> str:
        """How a run that cannot go on from what is there is made again: with its bill, as long as the folder is one."""
        folder = self.folder.runs.of(job.hash)
        whole = (folder / "config.yaml").exists() and (folder / "checkpoints").exists()
        what = f"runs/{job.hash}/checkpoints" if whole else f"runs/{job.hash}"
        return f"; it is made anew once {what} is removed" if folder.exists() else ""

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
