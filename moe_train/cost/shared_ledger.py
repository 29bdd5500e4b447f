"""`outputs/ledger.jsonl`: every attempt of every run, for the bill of a whole project.

Append-only: a line is the account of one attempt as it stood, and its last line holds. One process writes at a time, a
line in one write; one that a full disk cut short is passed over by the reader and closed by the next writer. A running
attempt adds a line whenever its clock has grown by a twentieth: a killed one is known to 5% from this file alone, and
the lines grow with the logarithm of its length. Where the run's folder is still there, its own account, good to a
second, is preferred.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import filelock

from moe_train.cost.attempt import KILLED, RUNNING, Attempt, as_line, read_attempt
from moe_train.errors import UserError

GROWTH = 1.05
SILENT_SECONDS = 15.0  # a running attempt that said nothing for so long was killed


class SharedLedger:
    """Writes to the ledger at `path`, made where it is missing. UserError where that cannot be done."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._due_at = 0.0
        # The system lets go of it when its holder dies.
        self._lock = filelock.FileLock(self.path.with_name(f".{self.path.name}.lock"))
        if self.path.exists() and not self.path.is_file():
            raise UserError(f"cost.ledger={path} is no ordinary file: choose another, or null for none")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("ab").close()
        except OSError as error:
            raise UserError(
                f"cost.ledger={path} cannot be written ({error.strerror}): choose another file, or null for none"
            ) from None

    def record(self, attempt: Attempt, force: bool) -> None:
        """Append the attempt as it stands if that is due, or with `force`."""
        if force or attempt.wall_seconds >= self._due_at:
            self.append(attempt)
            self._due_at = max(attempt.wall_seconds * GROWTH, attempt.wall_seconds + 1)

    def append(self, attempt: Attempt) -> None:
        line = (as_line(attempt) + "\n").encode()
        with self._lock, self.path.open("ab+", buffering=0) as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            file.write(line)


def read_ledger(path: Path) -> tuple[list[Attempt], int]:
    """The attempts as they last stood, in the order they began, and how many lines could not be read."""
    latest: dict[str, Attempt] = {}
    unreadable = 0
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise UserError(f"there is no ledger {path}: give ledger=PATH, or train a run first") from None
    except OSError as error:
        raise UserError(f"the ledger {path} cannot be read ({error.strerror}): give another ledger=PATH") from None
    for line in lines:
        if not line.strip():
            continue
        try:
            attempt = read_attempt(line)
        except ValueError:
            unreadable += 1
            continue
        latest[attempt.id] = attempt
    return [_settled(attempt) for attempt in latest.values()], unreadable


def _settled(attempt: Attempt) -> Attempt:
    """A running attempt as its folder has it now, and as killed where it has fallen silent."""
    from moe_train.cost.ledger import read_account

    if attempt.status != RUNNING:
        return attempt
    if attempt.run is not None:
        try:
            account = {own.id: own for own in read_account(Path(attempt.run) / "ledger.json")}
        except (UserError, OSError):
            account = {}
        attempt = account.get(attempt.id, attempt)
    silent = datetime.now(UTC) - datetime.fromisoformat(attempt.updated_at)
    # The shared file alone hears from a run only when its clock has grown by a twentieth.
    patience = max(SILENT_SECONDS, attempt.wall_seconds * (GROWTH - 1) * 1.5)
    if attempt.status == RUNNING and silent > timedelta(seconds=patience):
        attempt.status = KILLED
    return attempt
