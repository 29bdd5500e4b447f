"""Where the runs of a suite are, and what a finished one left: summary, curve, bill, and how it was timed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.claims.plan import RUNS, PlannedRun
from moe_train.cost.ledger import read_account
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
_ABOVE_ZERO = ("steps", "tokens", "train_seconds", "flops_per_token", "total_params", "step")
_ROW: dict[str, tuple[type, ...]] = {
    **{"step": (int,), "throughput/step_seconds": _NUMBER},
    **dict.fromkeys(("train/loss", "val/loss", "moe/max_violation"), _MAYBE),
    **dict.fromkeys(("progress/tokens", "progress/flops", "cost/usd_train"), _MAYBE),
}


def _check(content: Any, kinds: dict[str, tuple[type, ...]], where: str) -> None:
    """Refuse a file that was not written by a run: a figure that is missing, of another kind or not finite."""
    if not isinstance(content, dict):
        raise UserError(f"{where} is none of a run: {_REMEDY}")
    for key, kind in kinds.items():
        value = content.get(key)
        not_finite = isinstance(value, float) and not math.isfinite(value)
        too_low = key in _ABOVE_ZERO and isinstance(value, int | float) and value <= 0
        if not isinstance(value, kind) or not_finite or too_low:
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

    def spent(self, run: PlannedRun) -> float | None:
        """Dollars of all attempts; None where they are not known, as without a price or of an account that is damaged.

        Which it is says the run itself, or what reads it.
        """
        try:
            return self.runs.spent(run.hash)
        except UserError:
            return None

    def results(self, runs: Sequence[PlannedRun]) -> tuple[list[Result], list[str]]:
        """What the finished ones of `runs` left, in their order; and what of it is damaged, a line each."""
        found: list[Result] = []
        damaged: dict[str, None] = {}
        for run in runs:
            try:
                result = self.result(run)
            except UserError as error:
                damaged[str(error)] = None  # once, where others start from it
                continue
            if result is not None:
                found.append(result)
        return found, list(damaged)

    def result(self, run: PlannedRun) -> Result | None:
        """What the run left if it is finished; one whose summary names another configuration too: that is looked at by
        the integrity check. Raises UserError where its files are damaged."""
        folder, place = self.runs.of(run.hash), f"{RUNS}/{run.hash}"
        summary = self.runs.summary(run.hash)
        if summary is None:
            return None
        _check(summary, _SUMMARY, f"{place}/summary.json")
        try:
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        except (OSError, ValueError):
            raise UserError(f"{place}/metrics.jsonl cannot be read: {_REMEDY}") from None
        if not rows:
            raise UserError(f"{place}/metrics.jsonl is empty: {_REMEDY}")
        for row in rows:
            _check(row, _ROW, f"{place}/metrics.jsonl")
        try:
            read_account(folder / "ledger.json")
        except UserError:
            raise UserError(f"{place}/ledger.json cannot be read: {_REMEDY}") from None
        neighbours = int(self.runs.noted(run.hash).get("neighbours", 0))
        return Result(run, folder, summary, rows, neighbours, None if run.start is None else self.result(run.start))
