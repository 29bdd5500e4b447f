"""Runs that are named by the hash of their configuration: where each is, and what is known of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from moe_train.cost.attempt import Attempt
from moe_train.cost.ledger import read_account
from moe_train.errors import UserError
from moe_train.processes import is_alive


def is_divergence(says: str) -> bool:
    """Whether the last words of a run are those of one whose loss or gradient is not finite (training/loop.py)."""
    return says.startswith("the loss is ")


def last_words(log: Path) -> str:
    """The last line of what a job said."""
    try:
        said = log.read_text(errors="replace")
    except OSError:
        said = ""
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else "it said nothing"


@dataclass(frozen=True)
class RunsByHash:
    """`PATH/HASH` is a run's folder; `HASH.log`, beside it, what its processes said, `HASH.json` how it was started."""

    path: Path

    def of(self, run_hash: str) -> Path:
        return self.path / run_hash

    def beside(self, run_hash: str, ending: str) -> Path:
        return self.path / f"{run_hash}{ending}"

    def log(self, run_hash: str) -> Path:
        return self.beside(run_hash, ".log")

    def last_words(self, run_hash: str) -> str:
        """The last line of its log."""
        return last_words(self.log(run_hash))

    def diverged(self, run_hash: str) -> str | None:
        """What the run said when its loss was no longer finite, if that is how it ended: made again it would again."""
        if self.is_finished(run_hash) or self.is_at_work(run_hash):
            return None
        says = self.last_words(run_hash)
        return says if is_divergence(says) else None

    def summary(self, run_hash: str) -> dict[str, Any] | None:
        """Of a run that ended as planned. Whether it is of this configuration is not looked at."""
        try:
            summary: dict[str, Any] = json.loads((self.of(run_hash) / "summary.json").read_text())
        except (OSError, ValueError):
            return None
        known = isinstance(summary, dict) and summary.get("status") == "finished"
        return summary if known else None

    def is_finished(self, run_hash: str) -> bool:
        return self.summary(run_hash) is not None

    def spent(self, run_hash: str) -> float | None:
        """Dollars of all attempts so far, finished or not; None where one has no price. UserError where damaged."""
        known = [attempt.usd for attempt in read_account(self.of(run_hash) / "ledger.json")]
        return None if any(usd is None for usd in known) else sum(usd or 0.0 for usd in known)

    def attempts(self) -> list[Attempt]:
        """Of all runs that are here; of those whose account is damaged none, which who reads that run says."""
        found: list[Attempt] = []
        for account in sorted(self.path.glob("*/ledger.json")):
            with contextlib.suppress(UserError):
                found += read_account(account)
        return found

    # ---------------------------------------------------------------------------------------- its last process

    def note(self, run_hash: str, content: Mapping[str, Any]) -> None:
        """Of the job that makes it: at once and as a whole, since whoever started it may be killed."""
        temporary = self.beside(run_hash, ".json.tmp")
        temporary.write_text(json.dumps(content) + "\n")
        temporary.replace(self.beside(run_hash, ".json"))

    def starting(self) -> filelock.BaseFileLock:
        """To be held from asking whether a run is at work to noting who makes it: sweeps may share a folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(self.path / ".starting.lock")

    def noted(self, run_hash: str) -> dict[str, Any]:
        """What was noted of the last job; nothing where nothing was."""
        try:
            content: dict[str, Any] = json.loads(self.beside(run_hash, ".json").read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def pid_at_work(self, run_hash: str) -> int | None:
        """The process that makes the run just now, as far as one was noted; it may outlive whoever started it."""
        return self._living(run_hash, "pid", "began")

    def has_living_sweep(self, run_hash: str) -> bool:
        """Whether the sweep that started that process is there too."""
        return self._living(run_hash, "sweep", "sweep_began") is not None

    def _living(self, run_hash: str, name: str, moment: str) -> int | None:
        noted = self.noted(run_hash)
        pid, then = noted.get(name), noted.get(moment)
        return pid if isinstance(pid, int) and is_alive(pid, then) else None

    def is_at_work(self, run_hash: str) -> bool:
        """Whether some process makes the run just now: the one that was noted, or one that holds the folder."""
        if self.pid_at_work(run_hash) is not None:
            return True
        folder = self.of(run_hash)
        if not folder.is_dir():
            return False
        try:
            with filelock.FileLock(folder / ".lock", timeout=0):
                return False
        except filelock.Timeout:
            return True
