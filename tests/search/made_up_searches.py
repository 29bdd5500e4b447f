"""Searches over runs that nobody trains: each has the loss that a function of its settings gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import yaml
from rich.console import Console

from moe_train.compose import validated
from moe_train.config.sweep import SweepConfig
from moe_train.search.search import Asked, Search
from moe_train.sweeps.board import Board
from moe_train.sweeps.devices import Devices
from moe_train.sweeps.pool import Made

RATE = {"optimizer.lr": {"kind": "float", "low": 0.001, "high": 0.1, "log": True}}
CONTENT: dict[str, Any] = {
    "question": "Which rate?",
    "base": ["tracking=none"],
    "objectives": ["val_bits_per_byte"],
    "space": RATE,
    "trials": 4,
}

Settings = dict[str, Any]


def config(**changes: Any) -> SweepConfig:
    content = {key: value for key, value in {**CONTENT, **changes}.items() if value is not ...}
    return validated(SweepConfig, content, "mine.yaml")


def asked(folder: Path, **changes: Any) -> Asked:
    own = {key: changes.pop(key) for key in ("given", "usd", "jobs") if key in changes}
    ledger = f"cost.ledger={folder}/ledger.jsonl"
    changes["base"] = [*changes.get("base", CONTENT["base"]), ledger]
    return Asked("mine", config(**changes), "mine.yaml", folder / "out", folder / "runs", **own)


class Process:
    def __init__(self, status: int | None) -> None:
        self.pid, self.status = 2**30, status

    def poll(self) -> int | None:
        return self.status


class MadeUp:
    """Starts no process. `summary` gives a run's from its settings; None: it diverges."""

    def __init__(self, summary: Callable[[Settings], Mapping[str, Any] | None]) -> None:
        self.summary = summary
        self.started: list[Settings] = []

    def __call__(self, overrides: Sequence[str], output: IO[str], environment: Mapping[str, str]) -> Process:
        settings = {o.partition("=")[0]: yaml.safe_load(o.partition("=")[2]) for o in overrides if "=" in o}
        settings["optimizer.lr"] = float(settings.get("optimizer.lr", 0))
        self.started.append(settings)
        found = self.summary(settings)
        if found is None:
            output.write("error: the loss is nan and the gradient norm nan at step 3\n")
            output.flush()
            return Process(1)
        folder = Path(settings["run_dir"])
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({"status": "finished", "usd_total": 0.1, **found}))
        return Process(0)


def make(search: Search, start: Callable[..., Any]) -> Made:
    """All trials that are left, and the worker leaves."""
    with search.at_work():
        return search.make(Devices(), Board(console=Console(quiet=True)), start)
