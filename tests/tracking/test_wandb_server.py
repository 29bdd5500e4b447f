"""A run that is sent to wandb's server while it goes on, and a server that stops answering in the middle of it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from wandb_server import WandbServer

from moe_train.config import TrackingConfig
from moe_train.tracking import wandb_run, wandb_watch
from moe_train.tracking.tracker import Tracker


@pytest.fixture
def server(monkeypatch, tmp_path) -> Iterator[WandbServer]:
    server = WandbServer()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name, value in {**server.environment, "HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    yield server
    server.close()
    sys.modules["wandb"].teardown()


def online(folder: Path) -> Tracker:
    folder.mkdir(exist_ok=True)
    config = TrackingConfig("online", "p", "sweep-7", ("a", "b"), "what it is for", 1)
    return Tracker(folder, config, {"model": {"hidden_size": 8}}, "nano", "id123", None)


def logged(run: Tracker, steps: range) -> None:
    for step in steps:
        run.log(step, {"train/loss": 1.0 / step, "progress/tokens": 64.0 * step})


def rows(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_online_run_arrives_whole_with_group_tags_notes_and_configuration(server, tmp_path, capfd):
    run = online(tmp_path)
    assert run.wandb_location == f"{os.environ['WANDB_BASE_URL']}/me/p/runs/id123"
    logged(run, range(1, 21))
    run.finish({"status": "finished", "usd_total": 0.5})
    assert [row["_step"] for row in server.history.values()] == rows(tmp_path) == list(range(1, 21))
    assert server.history[4]["train/loss"] == 0.2
    assert server.summary["usd_total"] == 0.5
    sent = server.runs["id123"]
    assert (sent["displayName"], sent["groupName"], sent["tags"]) == ("nano", "sweep-7", ["a", "b"])
    assert sent["notes"] == "what it is for"
    assert json.loads(sent["config"])["model"]["value"] == {"hidden_size": 8}
    assert run.wandb_location.startswith("http")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("mode", ["hangs", "errors"])
def test_a_server_that_stops_answering_is_told_once_does_not_hold_the_run_and_gets_the_rest_later(
    mode, server, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(wandb_watch, "_SECONDS_BETWEEN_QUESTIONS", 0.0)
    monkeypatch.setattr(wandb_watch, "_PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(wandb_run, "_LAST_TRY_SECONDS", 0.5)
    run = online(tmp_path)
    server.mode = mode
    step, warned = 0, ""
    while not warned and step < 1000:
        step += 1
        logged(run, range(step, step + 1))
        warned = capfd.readouterr().err
        server.ended.wait(0.02)
    assert warned.startswith("warning: wandb has not answered for ")
    logged(run, range(step + 1, step + 21))
    run.finish({"status": "finished", "usd_total": 0.5})
    assert capfd.readouterr().err == ""  # it was said
    assert rows(tmp_path) == list(range(1, step + 21))
    (folder,) = (tmp_path / "wandb").glob("run-*")
    assert run.wandb_location == str(folder)
    assert f"`wandb sync --no-skip-online {folder}` sends the rest later" in warned

    server.mode = "answers"
    server.history.clear()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = re.findall("`(wandb sync .*)`", warned)[0]
    subprocess.run(
        ["bash", "-c", command], check=True, capture_output=True, timeout=60, env={**os.environ, "PATH": path}
    )
    assert [row["_step"] for row in server.history.values()] == rows(tmp_path)
    assert server.history[step]["train/loss"] == 1 / (step + 1)
    assert server.summary["usd_total"] == 0.5


def test_one_that_stops_at_the_very_end_is_waited_for_no_longer_than_a_limit_leaves(server, tmp_path, capfd):
    run = online(tmp_path)
    logged(run, range(1, 4))
    server.mode = "hangs"
    run.finish({"status": "finished"}, seconds_left=0.0)
    (folder,) = (tmp_path / "wandb").glob("run-*")
    warning = (
        f"warning: wandb did not take everything within 1 s: `wandb sync --no-skip-online {folder}` sends the rest\n"
    )
    assert capfd.readouterr().err == warning
    assert rows(tmp_path) == [1, 2, 3]
    assert "wandb-core" not in [child.name() for child in psutil.Process().children(recursive=True)]
    server.mode = "answers"
    again = online(tmp_path / "another")  # wandb itself can be used again
    again.finish({"status": "finished"})
    assert again.wandb_location.startswith("http")


def test_a_server_that_answers_again_leaves_nothing_to_be_sent(server, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(wandb_watch, "_SECONDS_BETWEEN_QUESTIONS", 0.0)
    monkeypatch.setattr(wandb_watch, "_PATIENCE_SECONDS", 0.2)
    run = online(tmp_path)
    server.mode, step = "errors", 0
    while "warning" not in capfd.readouterr().err and step < 1000:
        step += 1
        logged(run, range(step, step + 1))
        server.ended.wait(0.02)
    server.mode = "answers"
    monkeypatch.setattr(wandb_watch, "_PATIENCE_SECONDS", 60.0)
    run.finish({"status": "finished"})
    assert len(server.history) == step
    assert run.wandb_location.startswith("http")
    assert capfd.readouterr().err == ""
