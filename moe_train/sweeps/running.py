"""A job while it runs: its process, or one that an earlier sweep left behind, and how it is told to end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Protocol

from moe_train.sweeps.job import Job
from moe_train.sweeps.metrics import MetricsTail, progress
from moe_train.sweeps.runs import RunsByHash

ANY_DEVICE = -1
PATIENCE_SECONDS = 60.0  # from the signal to the end: a step and a checkpoint; then it is killed


class Process(Protocol):
    """What a started job can be asked: the part of subprocess.Popen that is needed."""

    pid: int

    def poll(self) -> int | None: ...


Start = Callable[[Sequence[str], IO[str], Mapping[str, str]], Process]


class Orphan:
    """The process, of whoever started it, that makes a run already: it is waited for, and the run not made twice."""

    def __init__(self, runs: RunsByHash, run_hash: str) -> None:
        self._runs, self._hash = runs, run_hash
        pid = runs.pid_at_work(run_hash)
        # One whose sweep is alive is that sweep's to end.
        self.pid = 0 if pid is None or runs.has_living_sweep(run_hash) else pid

    def poll(self) -> int | None:
        return None if self._runs.is_at_work(self._hash) else 0


@dataclass
class Running:
    """`device`: which group of devices it sees, ANY_DEVICE where it is not known, of an orphan. `output`: its log, None
    for an orphan. `neighbours`: most so far."""

    job: Job
    process: Process
    tail: MetricsTail
    device: int
    output: IO[str] | None
    neighbours: int = 0
    ending: str | None = None  # why it was told to end
    _deadline: float = float("inf")
    _before: float | None = None  # how far it had come when it was first asked
    _first: tuple[float, float] | None = None  # when it was first seen to go on from there, and how far it had come

    def is_beside(self, device: int) -> bool:
        """Whether it may share that device."""
        return self.device == device or ANY_DEVICE in (self.device, device)

    @property
    def progress(self) -> float:
        return progress(self.job.config.stop, self.tail.last)

    @property
    def seconds_left(self) -> float | None:
        """At the speed since it was first seen; None where that cannot be told yet."""
        done, now = self.progress, time.monotonic()
        if self._before is None:
            self._before = done
        # A run that goes on shows where it stood until it has started.
        if self._first is None and self.tail.last is not None and done != self._before:
            self._first = (now, done)
        if self._first is None or done <= self._first[1]:
            return None
        return (now - self._first[0]) * (1 - done) / (done - self._first[1])

    def end(self, why: str) -> None:
        """Ask for a checkpoint and an end; the first reason stands."""
        if self.ending is None:
            self.ending, self._deadline = why, time.monotonic() + PATIENCE_SECONDS
            _signal(self.process, signal.SIGTERM)

    @property
    def is_of_others(self) -> bool:
        """Whether it was to end and is not ours to end."""
        return self.ending is not None and self.process.pid <= 0

    def kill(self) -> None:
        _signal(self.process, signal.SIGKILL)

    def poll(self) -> int | None:
        """The exit status once there is one; at once where it was to end and is not ours to end."""
        status = self.process.poll()
        if status is None and self.is_of_others:
            return 0
        if status is None and time.monotonic() > self._deadline:
            self.kill()
        return status


def _signal(process: Process, number: signal.Signals) -> None:
    """To the job's whole process group."""
    if process.pid <= 0:
        return
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        if isinstance(process, subprocess.Popen):
            process.send_signal(number)
