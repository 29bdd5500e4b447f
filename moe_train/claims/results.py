"""Where the runs of a suite are, and what a finished one left: summary, curve, bill, and how it was timed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.claims.plan import PlannedRun
from moe_train.errors import UserError
from moe_train.sweeps.runs import RunsByHash

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
    """The folder of a suite, with its `runs` by hash."""

    path: Path

    @property
    def runs(self) -> RunsByHash:
        return RunsByHash(self.path / "runs")

    def is_finished(self, run: PlannedRun) -> bool:
        return self.runs.is_finished(run.hash)

    def result(self, run: PlannedRun) -> Result | None:
        """What the run left if it is finished; one whose summary names another configuration too: that is looked at by
        the integrity check. Raises UserError where its files cannot be read."""
        folder = self.runs.of(run.hash)
        summary = self.runs.summary(run.hash)
        if summary is None:
            return None
        try:
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        except (OSError, ValueError):
            raise UserError(
                f"{folder}/metrics.jsonl cannot be read: remove the folder, and the run is made again"
            ) from None
        return Result(run, folder, summary, rows, int(self.runs.noted(run.hash).get("neighbours", 0)))
