"""The account of a run's attempts: what each took, even if it was killed, so that a resumed run knows its whole bill.

One small `ledger.json` in the run's folder, replaced as a whole (a temporary file, then `os.replace`), so a reader
finds the old account or the new one, never half of one. Nothing can be written by a process that is killed: its account
ends with its last heartbeat.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from moe_train.config.fields import NonNegative
from moe_train.errors import UserError

RUNNING = "running"
KILLED = "killed"


@dataclass(config=ConfigDict(extra="forbid", strict=True))
class Attempt:
    """One process of the run; both clocks are its own, without earlier attempts."""

    started_at: str  # ISO 8601, UTC
    wall_seconds: NonNegative
    train_seconds: NonNegative
    status: str  # "running", "killed", or what `finish` was told


@dataclass(config=ConfigDict(extra="forbid", strict=True))
class _Account:
    attempts: list[Attempt]


class Ledger:
    """Opens the account at `path` and adds this attempt, `already_elapsed` seconds after its process began.

    An earlier attempt that still says "running" was killed. UserError if the file is damaged. One process writes
    (rank 0), and a run has one process at a time.
    """

    HEARTBEAT_SECONDS = 1.0

    def __init__(self, path: Path, already_elapsed: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self.earlier = _read(path)
        for attempt in self.earlier:
            if attempt.status == RUNNING:
                attempt.status = KILLED
        started = datetime.now(UTC) - timedelta(seconds=already_elapsed)
        self._current = Attempt(started.isoformat(timespec="seconds"), already_elapsed, 0.0, RUNNING)
        self._write()

    @property
    def earlier_wall_seconds(self) -> float:
        return sum(attempt.wall_seconds for attempt in self.earlier)

    def lost_seconds(self, train_seconds_at_checkpoint: float) -> float:
        """Train seconds of earlier attempts that the checkpoint resumed from does not hold: work done twice.

        `train_seconds_at_checkpoint` is the meter's, over all attempts (0 where the run starts anew).
        """
        spent = sum(attempt.train_seconds for attempt in self.earlier)
        return max(0.0, spent - train_seconds_at_checkpoint)

    def heartbeat(self, wall_seconds: float, train_seconds: float, force: bool = False) -> None:
        """Record this attempt's own clocks so far; written at most once a second unless `force`."""
        self._current.wall_seconds = wall_seconds
        self._current.train_seconds = train_seconds
        if force or self._clock() - self._written_at >= self.HEARTBEAT_SECONDS:
            self._write()

    def finish(self, status: str) -> None:
        """Close this attempt with the clocks of its last heartbeat."""
        self._current.status = status
        self._write()

    def _write(self) -> None:
        temporary = self._path.with_name(self._path.name + ".tmp")
        attempts = [asdict(attempt) for attempt in [*self.earlier, self._current]]
        temporary.write_text(json.dumps({"attempts": attempts}, indent=1) + "\n")
        os.replace(temporary, self._path)
        self._written_at = self._clock()


def _read(path: Path) -> list[Attempt]:
    if not path.exists():
        return []
    try:
        return TypeAdapter(_Account).validate_json(path.read_bytes()).attempts
    except ValidationError as error:
        raise UserError(
            f"{path} is damaged ({error.errors()[0]['msg']}): restore it, or move it away to start the account at zero"
        ) from error
