"""Where the runs of a suite are, and what a finished one left: summary, curve, bill, and how it was timed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.claims.plan import RUNS, PlannedRun
from moe_train.errors import UserError
from moe_train.sweeps.runs import RunsByHash

Row = dict[str, Any]

_REMEDY = "remove the folder, and the run is made again"
_NUMBER, _MAYBE = (int, float), (int, float, type(None))
# What a finished run is asked for, and what kind of value that is.
_SUMMARY: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("steps", "tokens", "seed"), (int,)),
    **dict.fromkeys(("train_seconds", "flops_per_token", "total_params"), _NUMBER),
    **dict.fromkeys(
        ("val_loss", "val_bits_per_byte", "usd_train", "price_usd_per_hour", "final_max_violation"), _MAYBE
    ),
    **{"config_hash": (str,), "versions": (dict,), "val_complete": (bool, type(None)), "hardware": (str,)},
    **{"device_name": (str,), "num_threads": (int, type(None)), "compute_dtype": (str,), "corpus": (str,)},
}
_ROW: dict[str, tuple[type, ...]] = {"step": (int,), "throughput/step_seconds": _NUMBER}


def _check(content: Any, kinds: dict[str, tuple[type, ...]], where: str) -> None:
    """Refuse a file that was not written by a run: a figure that is missing, of another kind or not finite."""
    if not isinstance(content, dict):
        raise UserError(f"{where} is none of a run: {_REMEDY}")
    for key, kind in kinds.items():
        value = content.get(key)
        if not isinstance(value, kind) or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"{where} has {key}={value!r}: {_REMEDY}")


def warm_up_seconds(rows: Sequence[Row]) -> float:
    """What the first logged steps took beyond the pace of the next ones: kernels are loaded, a CUDA graph is captured.

    On an H200 1.7 s of the 4.3 s that a run of 12M tokens trained, whatever its arm: a longer run takes no more of it.
    """
    if len(rows) < 2:
        return 0.0
    first, second = (float(row["throughput/step_seconds"]) for row in rows[:2])
    return max(0.0, first - second) * int(rows[0]["step"])


@dataclass(frozen=True)
class Result:
    run: PlannedRun
    folder: Path
    summary: dict[str, Any]
    rows: list[Row]  # of metrics.jsonl
    neighbours: int  # jobs of the suite on the same device at some time of this one
    start: Result | None = None  # the run it began with the weights of

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
        return RunsByHash(self.path / RUNS)

    def is_finished(self, run: PlannedRun) -> bool:
        return self.runs.is_finished(run.hash)

    def diverged(self, run: PlannedRun) -> str | None:
        """What it said, if its loss was no longer finite: a result too, which is kept."""
        return self.runs.diverged(run.hash)

    def result(self, run: PlannedRun) -> Result | None:
        """What the run left if it is finished; one whose summary names another configuration too: that is looked at by
        the integrity check. Raises UserError where its files cannot be read."""
        folder = self.runs.of(run.hash)
        summary = self.runs.summary(run.hash)
        if summary is None:
            return None
        _check(summary, _SUMMARY, f"{folder}/summary.json")
        try:
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        except (OSError, ValueError):
            raise UserError(f"{folder}/metrics.jsonl cannot be read: {_REMEDY}") from None
        if not rows:
            raise UserError(f"{folder}/metrics.jsonl is empty: {_REMEDY}")
        for row in rows:
            _check(row, _ROW, f"{folder}/metrics.jsonl")
        neighbours = int(self.runs.noted(run.hash).get("neighbours", 0))
        return Result(run, folder, summary, rows, neighbours, None if run.start is None else self.result(run.start))
