"""Jobs of no training: real processes that sleep, or end as they are told, with what a run would leave."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from moe_train.cost.budget import Budget
from moe_train.sweeps.board import Board
from moe_train.sweeps.devices import Devices
from moe_train.sweeps.pool import Pool
from moe_train.sweeps.runs import RunsByHash

SLEEPS = "import time; time.sleep(120)"


def sleeping(arguments: Sequence[str] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SLEEPS, *arguments], text=True, start_new_session=True)


def write_summary(folder: Path, **figures: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps({"status": "finished"} | figures))


def run_dir(overrides: Sequence[str]) -> Path:
    (path,) = (Path(o.removeprefix("run_dir=").strip("'")) for o in overrides if o.startswith("run_dir="))
    return path


class Sleepers:
    """Starts jobs that do nothing for long, and keeps them."""

    def __init__(self) -> None:
        self.jobs: list[subprocess.Popen[str]] = []
        self.overrides: list[Sequence[str]] = []
        self.environments: list[Mapping[str, str]] = []

    def __call__(self, overrides: Sequence[str], output: IO[str], environment: Mapping[str, str]) -> Any:
        self.jobs.append(sleeping([str(run_dir(overrides))]))
        self.overrides.append(overrides)
        self.environments.append(environment)
        return self.jobs[-1]


class Ended:
    """A process that has ended already."""

    pid = 2**30

    def __init__(self, status: int = 0) -> None:
        self.status = status

    def poll(self) -> int:
        return self.status


class Instantly:
    """Jobs that end at once: with a result, or as `failing` (by the first of a job's overrides) says."""

    def __init__(self, failing: Mapping[str, int] | None = None) -> None:
        self.failing = failing or {}
        self.started: list[str] = []

    def __call__(self, overrides: Sequence[str], output: IO[str], environment: Mapping[str, str]) -> Ended:
        self.started.append(overrides[0])
        if status := self.failing.get(overrides[0]):
            output.write("error: it went wrong\n")
            output.flush()
            return Ended(status)
        write_summary(run_dir(overrides))
        return Ended()


def pool(path: Path, **changes: Any) -> Pool:
    settings: dict[str, Any] = {
        "runs": RunsByHash(path / "runs"),
        "budget": Budget("sweep", path / "ledger.jsonl", None),
        "jobs": 1,
        "devices": Devices(),
        "board": Board(console=Console(quiet=True)),
    }
    return Pool(**settings | changes)
