"""Jobs as real processes: ended when the budget is used up or the suite is, waited for when they outlived one."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pytest

from moe_train.claims import runner as runners
from moe_train.claims.made_up import write_run
from moe_train.claims.plan import Plan, PlannedRun
from moe_train.claims.results import Folder
from moe_train.claims.runner import Runner
from moe_train.cost.attempt import RUNNING, Attempt, as_line
from moe_train.cost.budget import Budget

Make = Callable[..., Plan]
SLEEPS = "import time; time.sleep(120)"


def sleeping(arguments: Sequence[str] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SLEEPS, *arguments], text=True, start_new_session=True)


class Sleepers:
    """Starts jobs that do nothing for long, and keeps them."""

    def __init__(self) -> None:
        self.jobs: list[subprocess.Popen[str]] = []
        self.environments: list[Mapping[str, str]] = []

    def __call__(self, overrides: Sequence[str], output: IO[str], environment: Mapping[str, str]) -> Any:
        self.jobs.append(sleeping())
        self.environments.append(environment)
        return self.jobs[-1]


def first_runs(plan: Plan) -> list[PlannedRun]:
    return plan.runs(plan.untuned())


def runner(tmp_path: Path, **changes: Any) -> Runner:
    settings: dict[str, Any] = {
        "folder": Folder(tmp_path / "out"),
        "budget": Budget("claims", tmp_path / "ledger.jsonl", None),
        "jobs": 1,
        "devices": 1,
        "on_gpu": False,
        "say": lambda _: None,
    }
    return Runner(**settings | changes)


def test_what_runs_is_ended_when_the_budget_is_used_up(tmp_path: Path, plan_of: Make) -> None:
    ledger = tmp_path / "ledger.jsonl"
    sleepers = Sleepers()

    def spends(*arguments: Any) -> Any:
        job = sleepers(*arguments)
        line = Attempt(run="x", sweep="claims", usd=0.9, wall_seconds=10.0, status=RUNNING)
        ledger.write_text(as_line(line) + "\n")
        return job

    made = runner(tmp_path, start=spends, budget=Budget("claims", ledger, 1.0))
    began = time.monotonic()
    missing = made.make(first_runs(plan_of()), "mine", {})
    assert time.monotonic() - began < 30
    assert [job.wait() for job in sleepers.jobs] == [-15]  # SIGTERM: a run saves its checkpoint
    assert any("budget.usd=1 was used up: 5 runs were not started" in line for line in missing)


def test_an_interrupted_suite_ends_its_jobs(tmp_path: Path, plan_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sleepers = Sleepers()
    made = runner(tmp_path, start=sleepers)

    def interrupt(_: float) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    plan = plan_of()
    monkeypatch.setattr(runners.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        made.make(first_runs(plan), "mine", {})
    assert [job.wait() for job in sleepers.jobs] == [-15]


def test_jobs_are_spread_over_the_gpus_there_are(
    tmp_path: Path, plan_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    sleepers = Sleepers()
    made = runner(tmp_path, start=sleepers, jobs=2, devices=2, on_gpu=True)
    plan = plan_of()
    runs = first_runs(plan)
    threading.Timer(1.5, lambda: [job.kill() for job in sleepers.jobs]).start()
    made.make(runs[:2], "mine", {})
    assert [e["CUDA_VISIBLE_DEVICES"] for e in sleepers.environments] == ["3", "5"]
    assert [made.folder.neighbours(run.hash) for run in runs[:2]] == [0, 0]


def test_a_job_that_outlived_its_suite_is_waited_for_and_not_made_again(tmp_path: Path, plan_of: Make) -> None:
    plan, sleepers = plan_of(), Sleepers()
    run = first_runs(plan)[0]
    made = runner(tmp_path, start=sleepers)
    made.folder.of(run.hash).mkdir(parents=True)
    orphan = sleeping([f"run_dir={made.folder.of(run.hash)}"])
    noted = {"neighbours": 0, "pid": orphan.pid}
    made.folder.beside(run.hash, ".json").write_text(json.dumps(noted))

    def finishes() -> None:
        write_run(plan.arms[run.arm], run, made.folder, 2.0)
        orphan.kill()
        orphan.wait()

    threading.Timer(1.0, finishes).start()
    assert made.make([run], "mine", {}) == []
    assert not sleepers.jobs
