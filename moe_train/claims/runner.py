"""Makes the runs of a suite: one launched job each, several at a time over the devices there are.

A run that is finished is not made again, and one that was cut short goes on from its checkpoint (resume=auto), so a
suite that is killed is started again with the same command. A job that outlived a killed suite is waited for. The
budget is held over all of them: no job is started that it cannot pay for, and what runs is ended, with a checkpoint,
when it is used up. Budgets are not handed to the jobs themselves, whose learning rates would follow them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import filelock
import psutil

from moe_train.claims.plan import PlannedRun
from moe_train.claims.results import Folder
from moe_train.cost.budget import Budget
from moe_train.launch import start_job

POLL_SECONDS = 0.2
GRACE_SECONDS = 5.0  # from a signal to the end of a job: a step, a checkpoint and the tracker


class Job(Protocol):
    """What a started job can be asked: the part of subprocess.Popen that is needed."""

    pid: int

    def poll(self) -> int | None: ...


Start = Callable[[Sequence[str], IO[str], Mapping[str, str]], Job]


@dataclass
class _Running:
    run: PlannedRun
    job: Job
    device: int
    output: IO[str]
    neighbours: int


@dataclass
class Runner:
    """`devices`: how many there are (GPUs; a CPU is one). `settings`: overrides of every job that are no identity."""

    folder: Folder
    budget: Budget
    jobs: int
    devices: int
    on_gpu: bool
    settings: Sequence[str] = ()
    config_dir: Path | None = None
    start: Start = start_job
    say: Callable[[str], object] = sys.stderr.write
    _running: list[_Running] = field(default_factory=list)

    def make(self, runs: Sequence[PlannedRun], claim: str, arms_of: Mapping[str, Sequence[str]]) -> list[str]:
        """Make those of `runs` that are not finished, in their order; returns why some are missing, a line each.

        arms_of: the names under which each hash is known, for its tags in wandb.
        """
        left = [run for run in _once(runs) if not self.folder.is_finished(run)]
        missing: list[str] = []
        total, done = len(_once(runs)), len(_once(runs)) - len(left)
        if done:
            self.say(f"{claim}: {done} of {total} runs are there already\n")
        try:
            while left or self._running:
                while left and len(self._running) < self.jobs:
                    if refusal := self._refusal():
                        missing += [f"{refusal}: {len(left)} of {total} runs were not started"]
                        left = []
                        break
                    run = left.pop(0)
                    done += 1
                    self.say(f"[{done}/{total}] {claim}: {run.label}\n")
                    self._outwait(run)
                    if not self.folder.is_finished(run):
                        self._begin(run, claim, arms_of.get(run.hash, (run.arm,)))
                missing += self._reap()
                if self._running and self._overspent():
                    self._end_all()
                    missing += self._reap()
                    missing.append(f"budget.usd={self.budget.usd:g} was used up: {len(left)} runs were not started")
                    left = []
                time.sleep(POLL_SECONDS if self._running else 0)
        except BaseException:
            self._end_all()
            raise
        return missing

    # ---------------------------------------------------------------------------------------------------- one job

    def _outwait(self, run: PlannedRun) -> None:
        """Wait for a job that outlived the suite that started it."""
        pid = self.folder.noted(run.hash).get("pid")
        while pid is not None and _is_job(pid, run.hash):
            time.sleep(POLL_SECONDS)
        folder = self.folder.of(run.hash)
        if folder.exists():
            with filelock.FileLock(folder / ".lock"):
                pass

    def _begin(self, run: PlannedRun, claim: str, tags: Sequence[str]) -> None:
        folder = self.folder.of(run.hash)
        folder.parent.mkdir(parents=True, exist_ok=True)
        taken = [sum(other.device == device for other in self._running) for device in range(self.devices)]
        device = min(range(self.devices), key=lambda index: taken[index])
        beside = [other for other in self._running if other.device == device]
        for other in beside:
            self._note_neighbours(other, max(other.neighbours, len(beside)))
        overrides = [
            *([] if self.config_dir is None else ["--config-dir", str(self.config_dir.absolute())]),
            *run.overrides,
            *self.settings,
            f"name={claim}-{run.arm}-{run.seed}",
            f"run_dir={_quoted(folder)}",
            "resume=auto",
            f"cost.claim={claim}",
            f"cost.purpose={run.purpose}",
            f"cost.sweep={_quoted(self.budget.sweep)}",
            f"tracking.group={claim}",
            f"tracking.tags=[{','.join(dict.fromkeys([*tags, run.purpose]))}]",
        ]
        output = self.folder.beside(run.hash, ".log").open("a")
        job = self.start(overrides, output, self._sees(device))
        started = _Running(run, job, device, output, 0)
        self._note_neighbours(started, max(self.folder.neighbours(run.hash), len(beside)))
        self._running.append(started)

    def _note_neighbours(self, running: _Running, neighbours: int) -> None:
        """At once: a suite that is killed must not forget under what circumstances its jobs were timed."""
        running.neighbours = neighbours
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        content: dict[str, Any] = {
            "neighbours": neighbours,
            "load_average": load,
            "device": running.device,
            "pid": running.job.pid,
        }
        self.folder.beside(running.run.hash, ".json").write_text(json.dumps(content) + "\n")

    def _sees(self, device: int) -> dict[str, str]:
        if not self.on_gpu:
            return {}
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(index) for index in range(self.devices)]
        return {"CUDA_VISIBLE_DEVICES": names[device]}

    def _reap(self) -> list[str]:
        """Take leave of jobs that have ended; a line for each that did not finish its run."""
        missing = []
        for running in list(self._running):
            status = running.job.poll()
            if status is None:
                continue
            self._running.remove(running)
            running.output.close()
            if not self.folder.is_finished(running.run):
                said = self.folder.beside(running.run.hash, ".log")
                lines = [line for line in said.read_text(errors="replace").splitlines() if line.strip()]
                last = lines[-1].removeprefix("error: ") if lines else "it said nothing"
                line = f"{running.run.label} ended with exit status {status}: {last} (runs/{said.name})"
                self.say(f"  {line}\n")
                missing.append(line)
        return missing

    def _end_all(self) -> None:
        """Ask for a checkpoint and an end, and wait for it."""
        for running in self._running:
            _signal(running.job, signal.SIGTERM)
        deadline = time.monotonic() + 60
        while any(running.job.poll() is None for running in self._running):
            if time.monotonic() > deadline:
                for running in self._running:
                    _signal(running.job, signal.SIGKILL)
            time.sleep(POLL_SECONDS)

    # ----------------------------------------------------------------------------------------------------- budget

    def _refusal(self) -> str | None:
        """Why no further job is to be started, or None. The dearest so far stands for the next, and those running."""
        if self.budget.usd is None:
            return None
        expected = self.budget.expected(())
        left = self.budget.usd - self.budget.spent() - expected * len(self._running)
        if left > 0 and left >= expected:
            return None
        have = f"budget.usd={self.budget.usd:g} has ${max(left, 0):.3g} left"
        return f"{have}, and the next run needs about ${expected:.3g}"

    def _overspent(self) -> bool:
        """Whether what runs has to end now for the sum to stay within the budget."""
        if self.budget.usd is None:
            return False
        attempts = self.budget.attempts()
        seconds = sum(attempt.wall_seconds for attempt in attempts)
        rate = self.budget.spent() / seconds if seconds else 0.0
        return self.budget.spent() + rate * GRACE_SECONDS * len(self._running) >= self.budget.usd


def _once(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    return list({run.hash: run for run in runs}.values())


def _is_job(pid: int, run_hash: str) -> bool:
    try:
        return any(run_hash in word for word in psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


def _quoted(value: object) -> str:
    """For hydra's grammar."""
    text = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


def _signal(job: Job, number: signal.Signals) -> None:
    """To the job's whole process group."""
    try:
        os.killpg(job.pid, number)
    except (ProcessLookupError, PermissionError):
        if isinstance(job, subprocess.Popen):
            job.send_signal(number)
