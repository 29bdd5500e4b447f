"""A run that goes on says where its earlier steps were made, and every step is made at the pace of its device."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from command_line import TINY

from moe_train.config import RunConfig
from moe_train.training import loop
from moe_train.training import run as module


@pytest.fixture
def run(
    tmp_path: Path, text_corpus: Path, compose_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., dict[str, Any]]]:
    """Makes a run in `tmp_path`/run, or goes on with it; returns its summary."""
    monkeypatch.setenv("MOE_TRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    own = [f"data.files=[{text_corpus}/*.jsonl]", "cost.ledger=null", "resume=auto", f"run_dir={tmp_path / 'run'}"]

    def make(*overrides: str) -> dict[str, Any]:
        AcceleratorState._reset_state(True)
        replaced = {setting.split("=")[0] for setting in (*own, *overrides)}
        settings = [setting for setting in TINY if setting.split("=")[0] not in replaced]
        module.train(compose_run(*settings, *own, *overrides))
        found: dict[str, Any] = json.loads((tmp_path / "run/summary.json").read_text())
        return found

    yield make
    AcceleratorState._reset_state(True)


def test_seconds_of_two_devices_are_not_said_to_be_of_one(
    run: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("stop.steps=2")["earlier_hardware"] == []
    assert run("stop.steps=3")["earlier_hardware"] == []
    assert "earlier attempts" not in capsys.readouterr().err
    ledger = tmp_path / "run/ledger.json"
    content = json.loads(ledger.read_text())
    content["attempts"][0]["hardware"] = "h100"
    ledger.write_text(json.dumps(content))
    assert run("stop.steps=4")["earlier_hardware"] == ["h100"]
    assert "earlier attempts were on h100: seconds and tokens/s of the whole run are not those of" in " ".join(
        capsys.readouterr().err.split()
    )


def test_every_step_keeps_the_pace(run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    class Pace:
        followed = 0

        def follow(self) -> None:
            Pace.followed += 1

    monkeypatch.setattr(loop, "pace_of", lambda device_type, uses_clock: Pace() if uses_clock else None)
    run("stop.steps=3", "stop.seconds=1e6")  # since this process began, which other tests were in
    assert Pace.followed == 3
