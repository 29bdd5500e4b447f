"""The account of a run's attempts: what each took, even if it was killed, so that a resumed run knows its whole bill.

One small `ledger.json` in the run's folder, replaced as a whole (a temporary file, then `os.replace`), so a reader
finds the old account or the new one, never half of one. Nothing can be written by a process that is killed: its account
ends with its last heartbeat, at most a second before. The same lines go into the ledger that all runs share.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from moe_train.cost.attempt import KILLED, RUNNING, Attempt, as_dict, now
from moe_train.cost.shared_ledger import SharedLedger
from moe_train.errors import UserError


@dataclass(config=ConfigDict(extra="forbid", strict=True))
class _Account:
    attempts: list[Attempt]


class Ledger:
    """Opens the account at `path` and adds `attempt`, `already_elapsed` seconds after its process began.

    An earlier attempt that still says "running" was killed. UserError if the file is damaged. One process writes
    (rank 0), from any of its threads, and a run has one process at a time.
    """

    HEARTBEAT_SECONDS = 1.0

    def __init__(
        self,
        path: Path,
        attempt: Attempt | None = None,
        shared: SharedLedger | None = None,
        already_elapsed: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._shared, self._clock = path, shared, clock
        self._lock = threading.Lock()
        self._told = False  # that the shared ledger cannot be written
        self._written_at = -float("inf")
        self.attempt = attempt or Attempt()
        self.attempt.wall_seconds = already_elapsed
        started = datetime.now(UTC) - timedelta(seconds=already_elapsed)
        self.attempt.started_at = started.isoformat(timespec="milliseconds")
        self.earlier = read_account(path)
        for earlier in self.earlier:
            if earlier.status == RUNNING:
                earlier.status = KILLED
                if shared:
                    shared.append(earlier)
        self._write(force_shared=True)

    @property
    def earlier_wall_seconds(self) -> float:
        return sum(attempt.wall_seconds for attempt in self.earlier)

    @property
    def earlier_usd(self) -> float | None:
        """What earlier attempts cost, each at its own price; None if one of them had none."""
        return _sum(attempt.usd for attempt in self.earlier)

    @property
    def earlier_kwh(self) -> float | None:
        return _sum(attempt.energy_kwh for attempt in self.earlier)

    def lost_seconds(self, train_seconds_at_checkpoint: float) -> float:
        """Train seconds of earlier attempts that the checkpoint resumed from does not hold: work done twice.

        `train_seconds_at_checkpoint` is the meter's, over all attempts (0 where the run starts anew).
        """
        spent = sum(attempt.train_seconds for attempt in self.earlier)
        lost = max(0.0, spent - train_seconds_at_checkpoint)
        self.attempt.lost_seconds = max(0.0, lost - sum(attempt.lost_seconds for attempt in self.earlier))
        return lost

    def heartbeat(self, wall_seconds: float, train_seconds: float, force: bool = False, **figures: Any) -> None:
        """Record this attempt's own clocks and other `figures` of it so far; written once a second unless `force`."""
        with self._lock:
            if self.attempt.status != RUNNING:  # a heartbeat that was on its way when the attempt ended
                return
            self._update(wall_seconds=wall_seconds, train_seconds=train_seconds, **figures)
            if force or self._clock() - self._written_at >= self.HEARTBEAT_SECONDS:
                self._write()

    def finish(self, status: str) -> None:
        """Close this attempt with the clocks of its last heartbeat."""
        with self._lock:
            self.attempt.status = status
            self._write(force_shared=True)

    def _update(self, **figures: Any) -> None:
        for name, value in figures.items():
            setattr(self.attempt, name, value)

    def _write(self, force_shared: bool = False) -> None:
        self.attempt.updated_at = now()
        temporary = self._path.with_name(self._path.name + ".tmp")
        attempts = [as_dict(attempt) for attempt in [*self.earlier, self.attempt]]
        temporary.write_text(json.dumps({"attempts": attempts}, indent=1) + "\n")
        os.replace(temporary, self._path)
        self._written_at = self._clock()
        if self._shared:
            try:
                self._shared.record(self.attempt, force_shared)
            except OSError as error:  # no reason to lose the run, whose own account has been written
                if not self._told:
                    sys.stderr.write(
                        f"note: {self._shared.path} cannot be written ({error.strerror}): lines are missing\n"
                    )
                self._told = True


def _sum(values: Any) -> float | None:
    known = list(values)
    return None if any(value is None for value in known) else sum(known)


def read_account(path: Path) -> list[Attempt]:
    """The attempts in a run's `ledger.json`, none where there is no file. UserError if it is damaged."""
    if not path.exists():
        return []
    try:
        return TypeAdapter(_Account).validate_json(path.read_bytes()).attempts
    except ValidationError as error:
        raise UserError(
            f"{path} is damaged ({error.errors()[0]['msg']}): restore it, or move it away to start the account at zero"
        ) from error
