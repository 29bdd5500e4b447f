"""`python train.py -m key=a,b`: from the overrides of every job to runs that are made once, and a table of them.

A run is named by the hash of its configuration and lies in `outputs/runs/HASH`, whichever grid asked for it first: the
same command goes on where it was stopped, and a larger grid makes what the smaller one has not.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.compose import compose_run, quoted
from moe_train.cost.budget import Budget
from moe_train.errors import UsageError, UserError, one_line
from moe_train.launch import start_job
from moe_train.sweeps import closing_table
from moe_train.sweeps.board import Board
from moe_train.sweeps.devices import Devices, devices_here, jobs_at_a_time, threads_of_a_job
from moe_train.sweeps.job import Job, Outcome, once
from moe_train.sweeps.pool import Pool
from moe_train.sweeps.runs import RunsByHash


@dataclass(frozen=True)
class Grid:
    """How a grid is made: `jobs` at a time (None: as fit), each of `processes`; `out`: where its table is kept."""

    jobs: int | None
    processes: int
    runs: Path
    out: Path
    sweep: str | None  # cost.sweep
    ledger: str | None
    usd: float | None  # of all jobs together
    config_dir: Path | None = None


@dataclass(frozen=True)
class Planned:
    """One line of the table: the job, or why there is none."""

    label: str
    overrides: tuple[str, ...]
    job: Job | None
    mistake: str | None = None


def make_grid(job_overrides: Sequence[Sequence[str]], grid: Grid, devices: Devices | None = None) -> bool:
    """Make what is missing and show all of it; whether every job has a result. Raises UserError, Interrupted."""
    planned = plan(job_overrides, grid.config_dir)
    for line in planned:
        if line.mistake is not None:  # before the others start
            sys.stderr.write(f"cannot be made: {line.label}: {line.mistake}\n")
    jobs = once(line.job for line in planned if line.job is not None)
    runs = RunsByHash(grid.runs.absolute())
    if devices is None:  # to ask for them takes seconds
        devices = Devices() if all(runs.is_finished(job.hash) for job in jobs) else devices_here()
    sweep = grid.sweep or f"grid-{_digest([job.hash for job in jobs])}"
    threads = max((job.config.num_threads or 0 for job in jobs), default=0) or None
    at_a_time = jobs_at_a_time(devices, grid.jobs, threads, grid.processes)
    pool = Pool(
        *(runs, Budget.of(sweep, grid.ledger, grid.usd), at_a_time, devices, grid.processes),
        settings=threads_of_a_job(devices, at_a_time, threads, grid.processes),
        config_dir=grid.config_dir,
        start=functools.partial(start_job, processes=grid.processes) if grid.processes > 1 else None,
        board=Board(len(jobs)),
    )
    made = pool.make(_named(job, sweep) for job in jobs)
    lines = [_line(line, made.outcomes, runs) for line in planned]
    closing_table.show(lines, made.stopped, runs.path)
    closing_table.write(grid.out / "jobs.json", lines, made.stopped, sweep)
    made.raise_if_interrupted()
    return all(line["status"] in ("finished", "there already") for line in lines)


_OF_THE_GRID = {  # and no setting of its jobs
    "cost.sweep": "a grid is one sweep",
    "cost.ledger": "a grid has one ledger",
    "budget.usd": "a grid has one budget, which all jobs share",
}


def plan(job_overrides: Sequence[Sequence[str]], config_dir: Path | None) -> list[Planned]:
    """Compose every job. A mistake in one does not end the rest; what is wrong with the grid is a UserError."""
    if not job_overrides:
        raise UsageError("the grid is empty: a key has no value to take")
    for override in job_overrides[0]:
        key, _, value = override.lstrip("+").partition("=")
        if key == "run_dir":
            raise UserError(
                "run_dir= is of one run, and those of a grid are found by their hash: leave it out "
                "(hydra.launcher.runs=FOLDER moves them all)"
            )
        if key == "resume" and value != "auto":
            raise UserError(
                f"{override}: the runs of a grid go on by themselves: leave it out (init_from= starts anew)"
            )
    for key, why in _OF_THE_GRID.items():
        if len({o for overrides in job_overrides for o in overrides if o.lstrip("+").startswith(f"{key}=")}) > 1:
            raise UserError(f"{why}: give {key} one value")
    common = set.intersection(*(set(overrides) for overrides in job_overrides))
    found = []
    for overrides in job_overrides:
        own = overrides if len(job_overrides) == 1 else [o for o in overrides if o not in common]
        label = " ".join(own or overrides) or "defaults"  # none of its own: it is there twice
        try:
            job = Job(label, tuple(overrides), compose_run(list(overrides), "grid", config_dir))
        except UserError as error:
            found.append(Planned(label, tuple(overrides), None, one_line(error)))
        else:
            found.append(Planned(label, tuple(overrides), job))
    return found


def _named(job: Job, sweep: str) -> Job:
    """With what it belongs to; the pool holds the budget, of which the job itself is told nothing."""
    settings = [f"cost.sweep={quoted(sweep)}", "budget.usd=null"]
    settings += [f"tracking.group={quoted(sweep)}"] if job.config.tracking.group is None else []
    return Job(job.label, job.overrides, job.config, (*job.settings, *settings))


def _line(planned: Planned, outcomes: Sequence[Outcome], runs: RunsByHash) -> dict[str, Any]:
    line: dict[str, Any] = {"job": planned.label, "overrides": list(planned.overrides), "hash": None}
    if planned.job is None:
        return line | {"status": "failed", "exit_status": UserError.exit_status, "says": planned.mistake}
    own = [outcome for outcome in outcomes if outcome.job.hash == planned.job.hash]
    line |= {"hash": planned.job.hash, "status": "not started", "exit_status": None, "says": None}
    if own:
        line |= {"status": own[0].status, "exit_status": own[0].exit_status, "says": own[0].says}
    return line | closing_table.figures(runs, planned.job.hash)


def _digest(hashes: Sequence[str]) -> str:
    """The same for the same runs, so that a grid that is started again knows what it has spent."""
    return hashlib.sha256(" ".join(sorted(hashes)).encode()).hexdigest()[:8]
