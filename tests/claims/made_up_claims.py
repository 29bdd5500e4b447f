"""A claim of two tiny arms, and a launcher whose runs are made up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from command_line import TINY

from moe_train.claims.device import Device
from moe_train.claims.made_up import PRICE, write_run
from moe_train.claims.plan import Plan, PlannedRun
from moe_train.claims.results import Folder

HERE = Device("made up", 1, False, "cpu", PRICE)
SETTINGS = [o for o in TINY if not o.startswith(("stop", "tracking", "num_threads"))]
TWO_ARMS: dict[str, Any] = {
    "statement": "Two experts a token are better than one.",
    "source": "nowhere",
    "published": "nothing",
    "base": SETTINGS,
    "arms": {"one": {"overrides": ["model.moe.top_k=1"]}, "two": {"overrides": []}},
    "varies": ["model.moe.top_k"],
    "comparisons": [
        {"arm": "two", "against": "one", "measure": "val_loss", "test": {"kind": "superiority", "margin": 0.01}}
    ],
    "sigma": 0.01,
    "scales": {scale: {"overrides": [], "tokens": [2560], "seeds": 3} for scale in ("smoke", "cpu")},
    "carries_over": "Nothing.",
    "does_not_carry_over": "All of it.",
}


class MadeUpJob:
    pid = 2**30

    def __init__(self, status: int = 0) -> None:
        self.status = status

    def poll(self) -> int:
        return self.status


class MadeUpRuns:
    """Starts no process: writes what a run would leave. `loss` gives a run's; None: it fails, NaN: it diverges."""

    def __init__(self, plans: Sequence[Plan], loss: Callable[[PlannedRun], float | None]) -> None:
        self.runs: dict[str, tuple[Plan, PlannedRun]] = {}
        self.loss = loss
        self.started: list[PlannedRun] = []
        self.settings: list[Sequence[str]] = []
        self.changed: dict[str, Any] = {}  # of every summary
        for plan in plans:
            self.know(plan, plan.tuning_runs())
            self.know(plan, plan.runs(plan.untuned()))

    def know(self, plan: Plan, runs: Sequence[PlannedRun]) -> None:
        self.runs |= {run.hash: (plan, run) for run in runs}

    def __call__(self, overrides: Sequence[str], output: IO[str], environment: Mapping[str, str]) -> MadeUpJob:
        (path,) = (Path(o.removeprefix("run_dir=").strip("'")) for o in overrides if o.startswith("run_dir="))
        plan, run = self.runs[path.name]
        self.started.append(run)
        self.settings.append(overrides)
        loss = self.loss(run)
        if loss is None:
            output.write("error: the disk is full: free some space\n")
            return MadeUpJob(1)
        if math.isnan(loss):
            output.write("error: the loss is nan at step 3: lower optimizer.lr\n")
            return MadeUpJob(1)
        write_run(plan.arms[run.arm], run, Folder(path.parent.parent), loss, changed=self.changed)
        return MadeUpJob()
