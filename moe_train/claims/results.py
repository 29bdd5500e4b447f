"""Where the runs of a suite are, and what a finished one left: summary, curve, bill, and how it was timed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.claims.plan import PlannedRun
from moe_train.cost.ledger import read_account
from moe_train.errors import UserError

Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    run: PlannedRun
    folder: Path
    summary: dict[str, Any]
    rows: list[Row]  # of metrics.jsonl
    neighbours: int  # jobs of the suite on the same device at some time of this one

    @property
    def place(self) -> str:
        """Where it is within the suite's folder: what a report says must not depend on the machine."""
        return f"runs/{self.folder.name}"


@dataclass(frozen=True)
class Folder:
    """The folder of a suite: `runs/HASH` and beside each what the runner has to say of it, `runs/HASH.json`."""

    path: Path

    def of(self, run_hash: str) -> Path:
        return self.path / "runs" / run_hash

    def beside(self, run_hash: str, ending: str) -> Path:
        return self.path / "runs" / f"{run_hash}{ending}"

    def is_finished(self, run: PlannedRun) -> bool:
        return _summary(self.of(run.hash)) is not None

    def result(self, run: PlannedRun) -> Result | None:
        """What the run left if it is finished. Raises UserError where its files cannot be read."""
        folder = self.of(run.hash)
        summary = _summary(folder)
        if summary is None:
            return None
        try:
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        except (OSError, ValueError):
            raise UserError(
                f"{folder}/metrics.jsonl cannot be read: remove the folder, and the run is made again"
            ) from None
        return Result(run, folder, summary, rows, self.neighbours(run.hash))

    def noted(self, run_hash: str) -> dict[str, Any]:
        """What the runner noted of the job that made it; nothing where it did not."""
        try:
            content: dict[str, Any] = json.loads(self.beside(run_hash, ".json").read_text())
            return content
        except (OSError, ValueError):
            return {}

    def neighbours(self, run_hash: str) -> int:
        return int(self.noted(run_hash).get("neighbours", 0))

    def spent(self, run: PlannedRun) -> float | None:
        """Dollars of all attempts at the run so far, finished or not; None where one has no price."""
        known = [attempt.usd for attempt in read_account(self.of(run.hash) / "ledger.json")]
        return None if any(usd is None for usd in known) else sum(usd or 0.0 for usd in known)


def _summary(folder: Path) -> dict[str, Any] | None:
    """Of a run that ended as planned. One whose summary names another configuration is left to the integrity check."""
    try:
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    known = isinstance(summary, dict) and summary.get("status") == "finished"
    return summary if known else None
