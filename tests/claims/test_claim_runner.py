"""What a suite says of runs that are missing, and what it tells its jobs; how jobs are run is the pool's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from made_up_claims import MadeUpRuns
from rich.console import Console

from moe_train.claims.plan import Plan
from moe_train.claims.results import Folder
from moe_train.claims.runner import Runner
from moe_train.cost.budget import Budget
from moe_train.sweeps.devices import Devices


def test_runs_that_failed_are_named_with_what_they_said(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of()
    runs = plan.runs(plan.untuned())
    made = MadeUpRuns([plan], lambda run: None if run.arm == "two" else 2.0)
    budget = Budget("claims", tmp_path / "ledger.jsonl", None)
    runner = Runner(Folder(tmp_path / "out"), budget, 1, Devices(), start=made, console=Console(quiet=True))
    missing = runner.make([*runs, runs[0]], "mine", {runs[0].hash: ["one", "also one"]})
    assert len(made.started) == len(runs)  # each once
    assert len(missing) == len(runs) // 2
    failed = runs[1]
    expected: Any = f"{failed.label} ended with exit status 1: the disk is full: free some space"
    assert missing[0] == f"{expected} (runs/{failed.hash}.log)"
    assert {"tracking.tags=[one,also one,seed]", "cost.sweep='claims'"} <= set(made.settings[0])
