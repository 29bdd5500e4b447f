"""What a real run spends beside its steps: tracker, meter, data, progress bar.

Read from the rows that a run of the real command logs. Between two rows pass so many seconds; what of them were steps
is on the run's train clock, and what of a step was waiting for its batch is logged too. The rest, and the wait, is
overhead. The loop's own arithmetic around a step (progress, learning rate: microseconds) counts as step.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_train.benchmark.jobs import finished_job

WINDOWS = 4  # between rows of the log; the first warms up
_SETTINGS = (
    "checkpoint.every_steps=null",
    "eval.every_tokens=null",
    "eval.max_tokens=4096",
    "tracking.log_every_steps=10",  # as a run does that is told nothing else
    f"stop={{steps: {10 * WINDOWS}, tokens: null, flops: null, seconds: null, usd: null}}",
)


def run_shares(overrides: Sequence[str], folder: Path, device: str) -> tuple[list[float], list[float]]:
    """Of a run with the user's settings: shares of each window that were overhead, and that were waiting for data."""
    run = finished_job([*overrides, *_SETTINGS], folder, device)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return overhead_shares(rows)[1:], [row["throughput/data_wait_fraction"] for row in rows[2:]]


def overhead_shares(rows: Sequence[dict[str, Any]]) -> list[float]:
    """One between each two rows of a run's log."""
    shares = []
    for before, after in itertools.pairwise(rows):
        passed = after["progress/seconds"] - before["progress/seconds"]
        stepping = (after["step"] - before["step"]) * after["throughput/step_seconds"]
        shares.append(1 - stepping * (1 - after["throughput/data_wait_fraction"]) / passed)
    return shares
