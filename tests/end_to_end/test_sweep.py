"""The search command on real runs: killed at any moment it goes on, and what it reports leads to its runs."""

from __future__ import annotations

import json
import signal
import sys
import time
from typing import Any

import pytest
import yaml
from command_line import ROOT, Commands

SCRIPT = [sys.executable, str(ROOT / "scripts/sweep.py")]
RATE = {"optimizer.lr": {"kind": "float", "low": 0.001, "high": 0.1, "log": True}}


@pytest.fixture
def own(commands: Commands) -> Commands:
    """With a search of their own."""
    space = {"question": "Which rate?", "objectives": ["val_bits_per_byte", "usd_total"], "space": RATE, "trials": 3}
    (commands.folder / "own/sweep").mkdir(parents=True)
    (commands.folder / "own/sweep/rates.yaml").write_text(yaml.safe_dump(space))
    return commands


def search(commands: Commands, *arguments: str) -> list[str]:
    return [*SCRIPT, "--config-dir", "own", "sweep=rates", *commands.tiny, *arguments]


def content_of(commands: Commands) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((commands.folder / "outputs/sweeps/rates/trials.json").read_text())
    return content


def test_a_killed_search_goes_on_and_its_report_leads_to_its_runs(own: Commands) -> None:
    settings = ["stop.steps=150", "checkpoint.every_steps=20", "jobs=2"]
    process = own.start(search(own, *settings))
    logged = own.folder / "outputs/runs"
    while not any(len(file.read_text().splitlines()) > 30 for file in logged.glob("*/metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    process.communicate()
    result = own.run(*search(own, *settings, "json=out.json", "plot=front.svg"))
    content = content_of(own)
    assert content == json.loads((own.folder / "out.json").read_text())
    (study,) = content["studies"]
    assert len(study["points"]) == 3
    assert study["without_result"] == {"pruned": 0, "failed": 0, "going": 0, "reasons": []}
    assert len(list(logged.glob("*/summary.json"))) == 3
    for point in study["points"]:
        (run,) = point["runs"]
        summary = json.loads((logged / run / "summary.json").read_text())
        assert point["values"] == [summary["val_bits_per_byte"], summary["usd_total"]]
        assert run in result.stdout
    assert "Pareto front" in result.stdout
    assert {tuple(p["runs"]) for p in content["front"]} <= {tuple(p["runs"]) for p in study["points"]}
    assert content["usd_spent"] >= sum(point["values"][1] for point in study["points"]) * 0.99
    for picture in ("front.svg", "outputs/sweeps/rates/trials.svg"):
        assert (own.folder / picture).read_text().startswith("<?xml")
    before = {file: file.stat().st_mtime for file in logged.glob("*/summary.json")}
    own.run(*search(own, *settings, "show=true"))
    own.run(*search(own, *settings))  # nothing is left to do
    assert {file: file.stat().st_mtime for file in logged.glob("*/summary.json")} == before


def test_an_interrupted_search_leaves_the_files_asked_for_to_the_same_command(own: Commands) -> None:
    command = search(own, "stop.steps=150", "checkpoint.every_steps=20", "trials=1", "json=out.json", "plot=rates.svg")
    process = own.start(command)
    while not list((own.folder / "outputs/runs").glob("*/metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "goes on with the same command, from the last checkpoint if any; json=out.json, plot=rates.svg: " in errors
    assert content_of(own)["studies"][0]["without_result"]["going"] == 1
    own.run(*command)
    assert content_of(own) == json.loads((own.folder / "out.json").read_text())
    assert len(content_of(own)["studies"][0]["points"]) == 1
    assert (own.folder / "rates.svg").exists()


def test_what_a_budget_has_paid_for_is_written_and_going_on_wants_other_files(own: Commands) -> None:
    # Longer than a run takes to be seen to be too dear.
    long = "stop.steps=100000"
    result = own.run(*search(own, "budget.usd=1e-7", "json=out.json", "plot=rates.svg", long), check=False)
    assert result.returncode == 1
    assert "the search goes on with the same command and a larger budget, another json=, another plot=" in result.stderr
    assert content_of(own) == json.loads((own.folder / "out.json").read_text())
    assert "plot=rates.svg is not written: no trial has a result" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "says", "status"),
    [
        (["sweep=expert"], "there is no sweep=expert: did you mean experts?", 1),
        ([], "sweep= is missing: python scripts/sweep.py sweep=NAME [budget.usd=N]", 2),
        (["sweep=experts", "trails=3"], "unknown key trails", 1),
        (["sweep=experts", "trials=0"], "trials=0: give a number of at least 1", 2),
        (["sweep=fp8_recipes", "trials=3"], "is a grid and makes all of it", 2),
        (["sweep=experts", "budget.usd=-1"], "budget.usd=-1: give a number above 0", 2),
        (["sweep=experts", "model.moe.top_k=3"], "model.moe.top_k is searched over by", 1),
        (["sweep=experts", "show=true"], "there is no search in outputs/sweeps/experts", 1),
        (["sweep=experts", "out=taken"], "taken", 1),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], says: str, status: int, commands: Commands) -> None:
    (commands.folder / "taken").write_text("mine")
    result = commands.run(*SCRIPT, *arguments, check=False)
    assert result.returncode == status, result.stderr
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert not (commands.folder / "outputs/runs").exists()
