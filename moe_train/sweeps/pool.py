"""Makes runs, several at a time over the devices there are: for grids, searches and claims alike.

A run that is finished is not made again, one that was cut short goes on from its checkpoint (resume=auto), and one that
a process of a killed sweep still makes is waited for: a sweep that is started again with the same command goes on. A
failed job does not end the rest. The budget is held over all of them: no job is started that it cannot pay for, and
what runs is ended, with a checkpoint, when it is used up, or when this process is killed and can hold it no more.
Ctrl-C and SIGTERM end what runs in the same way; a second one kills it. What another sweep makes is left to that.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moe_train.compose import quoted
from moe_train.cost.budget import Budget
from moe_train.errors import UserError
from moe_train.machine import load_average
from moe_train.processes import began
from moe_train.sweeps.board import Board
from moe_train.sweeps.devices import Devices
from moe_train.sweeps.job import Job, Outcome
from moe_train.sweeps.metrics import MetricsTail, Row
from moe_train.sweeps.running import ANY_DEVICE, Orphan, Running, Start
from moe_train.sweeps.runs import RunsByHash
from moe_train.sweeps.warm import WarmStarts
from moe_train.training.keepers import held_by_this_process
from moe_train.training.signals import Interruption

POLL_SECONDS = 0.2
BUDGET_SECONDS = 1.0  # between two looks into the ledger, to which runs write once a second


class Interrupted(UserError):
    """The sweep was told to end, and has ended its jobs. The exit status is the shell's for the signal."""

    def __init__(self, number: int, ended: int, unwritten: str = "") -> None:
        """unwritten: the files asked for that wait for the end."""
        jobs = "1 job was ended and goes" if ended == 1 else f"{ended} jobs were ended and go"
        super().__init__(
            f"interrupted by {signal.Signals(number).name}: {jobs} on with the same command, from the last checkpoint "
            f"if any{f'; {unwritten}: written when all is made' if unwritten else ''}"
        )
        self.exit_status = 128 + number


@dataclass
class Made:
    """What a pool has done. `stopped`: why it did not start all that was there. `interrupted`: the signal."""

    outcomes: list[Outcome] = field(default_factory=list)
    stopped: str | None = None
    interrupted: int | None = None

    def raise_if_interrupted(self, unwritten: str = "") -> None:
        if self.interrupted is not None:
            ended = [outcome for outcome in self.outcomes if outcome.status == "ended"]
            raise Interrupted(self.interrupted, sum(outcome.exit_status is not None for outcome in ended), unwritten)


Watch = Callable[[Job, Sequence[Row]], str | None]


@dataclass
class Pool:
    """`jobs` at a time, each on `processes` devices; `settings`: overrides of all of them that are no identity."""

    runs: RunsByHash
    budget: Budget
    jobs: int
    devices: Devices
    processes: int = 1
    settings: Sequence[str] = ()
    config_dir: Path | None = None
    start: Start | None = None  # None: jobs of one process, from one that has imported what they import
    board: Board = field(default_factory=Board)
    _start: Start = field(init=False)
    _running: list[Running] = field(default_factory=list)
    _waiting: list[Job] = field(default_factory=list)  # taken from the source and not begun
    _looked: float = -float("inf")

    def make(
        self,
        jobs: Iterable[Job],
        watch: Watch = lambda job, rows: None,
        ended: Callable[[Outcome], object] = lambda outcome: None,
    ) -> Made:
        """Make the runs of `jobs`, which is asked for the next when a place is free.

        watch: sees what a job has logged since the last time, and says why it should end, if it should. ended: is told
        of every outcome as it comes.
        """
        self._groups = self.devices.groups(self.processes)
        made, source, interruption = Made(), iter(jobs), Interruption(alone=True)

        def record(outcomes: Sequence[Outcome]) -> None:
            for outcome in outcomes:
                made.outcomes.append(outcome)
                self.board.ended(outcome)
                ended(outcome)

        try:
            with WarmStarts() as warm, self.board, interruption.noted():
                self._start = self.start or warm
                while True:
                    there = self._fill(source, made)
                    record(there)
                    reaped = self._reap()
                    record(reaped)
                    if interruption.signal is not None and made.interrupted is None:
                        made.interrupted = interruption.signal
                        made.stopped = f"interrupted by {signal.Signals(interruption.signal).name}"
                        self._end_all(made.stopped)
                    if there or reaped:
                        continue
                    if not self._running:
                        return made
                    self._look(watch)
                    self._hold_the_budget(made)
                    self.board.show(self._running)
                    time.sleep(POLL_SECONDS)
        except BaseException:
            self._end_all("the sweep failed")
            while any(running.poll() is None for running in self._running):
                time.sleep(POLL_SECONDS)
            raise
        finally:
            for running in self._running:  # where even waiting for their end was interrupted
                running.kill()
            self._running, self._waiting = [], []

    def _fill(self, source: Iterator[Job], made: Made) -> list[Outcome]:
        """Begin what there is room for, up to a run that is there already: it is told of before the next is asked."""
        while made.stopped is None and len(self._running) < self.jobs:
            job = self._waiting.pop(0) if self._waiting else next(source, None)
            if job is None:
                break
            if self.runs.is_finished(job.hash):
                return [Outcome(job, "there already")]
            with self.runs.starting():
                if self.runs.is_at_work(job.hash):
                    self._wait_for(job)
                elif refusal := self.budget.refusal(job.config.stop.usd, len(self._running)):
                    self._waiting.insert(0, job)
                    if not self._running:  # else what runs may turn out cheaper
                        made.stopped = refusal
                    break
                else:
                    self._begin(job)
        return []

    # ---------------------------------------------------------------------------------------------------- one job

    def _wait_for(self, job: Job) -> None:
        orphan = Orphan(self.runs, job.hash)
        tail = MetricsTail(self.runs.of(job.hash) / "metrics.jsonl")
        waited_for = Running(job, orphan, tail, device=ANY_DEVICE, output=None)
        waited_for.neighbours = self._meets(ANY_DEVICE)
        self._running.append(waited_for)
        self._note_neighbours(waited_for)
        self.board.waits_for(job)

    def _begin(self, job: Job) -> None:
        folder = self.runs.of(job.hash)
        taken = [sum(other.device == device for other in self._running) for device in range(len(self._groups))]
        device = min(range(len(taken)), key=lambda index: taken[index])
        beside = self._meets(device)
        overrides = [
            *([] if self.config_dir is None else ["--config-dir", str(self.config_dir.absolute())]),
            *job.overrides,
            *self.settings,
            *job.settings,
            f"run_dir={quoted(folder)}",
            "resume=auto",
        ]
        output = self.runs.log(job.hash).open("a")
        held = {} if self.budget.usd is None else held_by_this_process()
        process = self._start(overrides, output, {**self._groups[device], **held})
        neighbours = max(int(self.runs.noted(job.hash).get("neighbours", 0)), beside)
        started = Running(job, process, MetricsTail(folder / "metrics.jsonl"), device, output, neighbours)
        self._running.append(started)
        self._note(started)
        self.board.began(job)

    def _meets(self, device: int) -> int:
        """How many jobs one that begins on that device is timed beside; each of them has a neighbour more."""
        beside = [other for other in self._running if other.is_beside(device)]
        for other in beside:
            met = sum(each.is_beside(other.device) for each in self._running)  # itself counts for the one that begins
            other.neighbours = max(other.neighbours, met)
            self._note_neighbours(other)
        return len(beside)

    def _note_neighbours(self, running: Running) -> None:
        """The rest of what was noted is of when the job began, or of who began it."""
        if noted := self.runs.noted(running.job.hash):
            self.runs.note(running.job.hash, noted | {"neighbours": running.neighbours})

    def _note(self, running: Running) -> None:
        """Under what circumstances the job is timed, and who makes it: a sweep that is killed must not forget it."""
        content = {
            "neighbours": running.neighbours,
            "load_average": load_average(),
            "device": running.device,
            "pid": running.process.pid,
            "began": began(running.process.pid),
            "sweep": os.getpid(),
            "sweep_began": began(os.getpid()),
        }
        self.runs.note(running.job.hash, content)

    def _reap(self) -> list[Outcome]:
        """Take leave of jobs that have ended."""
        outcomes = []
        for running in list(self._running):
            status = running.poll()
            if status is None:
                continue
            self._running.remove(running)
            if running.output is not None:
                running.output.close()
            job = running.job
            if self.runs.is_finished(job.hash):
                outcomes.append(Outcome(job, "finished", status))
            elif running.is_of_others:
                outcomes.append(Outcome(job, "ended", None, f"{running.ending}; another sweep goes on with it"))
            elif running.ending is not None:
                outcomes.append(Outcome(job, "ended", status, running.ending))
            elif running.output is None:  # whoever made it did not finish it
                self._waiting.insert(0, job)
            else:
                outcomes.append(Outcome(job, "failed", status, self._says(job, status)))
        return outcomes

    def _says(self, job: Job, status: int) -> str:
        """Why it failed. One that was killed had no time to say it: its last line is of something else."""
        if status >= 0:
            return self.runs.last_words(job.hash)
        hint = ", as by a system that is out of memory" if -status == signal.SIGKILL else ""
        return f"killed by signal {-status} ({signal.strsignal(-status)}{hint})"

    # ------------------------------------------------------------------------------------------------ all of them

    def _look(self, watch: Watch) -> None:
        for running in self._running:
            rows = running.tail.new_rows()
            if running.ending is None and (why := watch(running.job, rows)):
                running.end(why)

    def _hold_the_budget(self, made: Made) -> None:
        if made.stopped is not None or not self._running or time.monotonic() - self._looked < BUDGET_SECONDS:
            return
        self._looked = time.monotonic()
        if self.budget.is_used_up(len(self._running)):
            made.stopped = f"budget.usd={self.budget.usd:g} was used up"
            self._end_all(made.stopped)

    def _end_all(self, why: str) -> None:
        for running in self._running:
            running.end(why)
