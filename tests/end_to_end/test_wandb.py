"""wandb from the command line: runs of a sweep sent to a server, and the workspace that shows what they cost."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from command_line import ROOT, Commands
from wandb_server import WandbServer

from moe_train.cost.communication import KINDS, Exchanged

pytestmark = pytest.mark.xdist_group("wandb")

SEVERAL = "Communication of several processes"
SCRIPT = [sys.executable, str(ROOT / "scripts/dashboard.py"), "wandb"]


class Sweep(NamedTuple):
    commands: Commands
    server: WandbServer
    output: str


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, text_corpus: Path, cache: Path) -> Iterator[Sweep]:
    """Two runs of a sweep, in `run0` and `run1`, sent to a server as they were made."""
    server = WandbServer()
    commands = Commands(tmp_path_factory.mktemp("sweep"), text_corpus, cache)
    commands.environment |= {**server.environment, "HOME": str(commands.folder)}
    output = ""
    for seed in (0, 1):
        settings = [f"seed={seed}", f"run_dir=run{seed}", "cost.sweep=seeds", "tracking.tags=[tiny]"]
        output += commands.train(*settings, "tracking.wandb=auto").stdout
    yield Sweep(commands, server, output)
    server.close()


@pytest.fixture
def server(commands: Commands) -> Iterator[WandbServer]:
    """An empty one, to which this test's commands go."""
    server = WandbServer()
    commands.environment |= {**server.environment, "HOME": str(commands.folder)}
    yield server
    server.close()


def test_runs_of_a_sweep_are_a_group_with_tags_configuration_and_what_auto_came_to(sweep: Sweep) -> None:
    assert sweep.output.count(f"{sweep.server.environment['WANDB_BASE_URL']}/me/moe_train/runs/") == 2
    assert "wandb sync" not in sweep.output
    assert len(sweep.server.runs) == 2
    for run in sweep.server.runs.values():
        assert run["groupName"] == "seeds"
        assert run["tags"] == ["tiny"]
        config = {key: entry["value"] for key, entry in json.loads(run["config"]).items() if key != "_wandb"}
        assert config["model"]["moe"]["num_experts"] == config["resolved"]["num_experts"] == 8
        assert config["resolved"]["precision"] == "fp32"
        assert config["resolved"]["hardware"] == "cpu"
        assert config["resolved"]["total_params"] == sweep.commands.summary("run0")["total_params"]


def test_dollars_of_a_sweep_go_on_from_run_to_run_and_what_one_bought_is_logged(sweep: Sweep) -> None:
    first, second = sweep.commands.summary("run0"), sweep.commands.metrics("run1")
    for row in second:
        assert row["cost/usd_sweep"] == pytest.approx(first["usd_total"] + row["cost/usd_total"])
    last, summary = second[-1], sweep.commands.summary("run1")
    saved = 8 - summary["val_bits_per_byte"]
    assert summary["bits_per_byte_per_usd"] == pytest.approx(saved / summary["usd_total"])
    # The bill when the evaluation was done lies between the row's and the last one.
    assert saved / summary["usd_total"] <= last["cost/bits_per_byte_per_usd"] <= saved / last["cost/usd_total"]


# --------------------------------------------------------------------------------------------------- the workspace


def dry(commands: Commands) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(commands.run(*SCRIPT, "project=p", "dry_run=true").stdout)
    return content


def shown(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The configurations of the workspace's panels by title."""
    sections = content["spec"]["section"]["panelBankConfig"]["sections"]
    return {panel["config"]["chartTitle"]: panel["config"] for section in sections for panel in section["panels"]}


def test_without_network_and_account_the_workspace_is_printed_with_every_panel_and_axis(
    commands: Commands, server: WandbServer
) -> None:
    del commands.environment["WANDB_API_KEY"]
    content = dry(commands)
    assert server.requests == []
    assert content["name"] == "Cost"
    sections = content["spec"]["section"]["panelBankConfig"]["sections"]
    assert {section["name"]: len(section["panels"]) for section in sections} == {
        "Loss": 4,
        "Cost and speed": 4,
        "Spending": 2,
        SEVERAL: 3,
        "Expert load by layer": 3,
    }
    panels = shown(content)
    for name, axis in (
        ("dollars", "cost/usd_total"),
        ("tokens", "progress/tokens"),
        ("FLOPs", "progress/flops"),
        ("seconds", "progress/seconds"),
    ):
        assert panels[f"Loss over {name}"]["xAxis"] == axis
        assert panels[f"Loss over {name}"]["metrics"] == ["train/loss", "val/loss"]
    for title, metric in (
        ("Dollars per million tokens", "cost/usd_per_million_tokens"),
        ("Tokens per second", "throughput/tokens_per_second"),
    ):
        for by, setting in (("precision", "precision"), ("experts", "num_experts")):
            panel = panels[f"{title} by {by}"]
            assert (panel["metrics"], panel["groupBy"], panel["groupAgg"]) == (
                [metric],
                f"resolved.value.{setting}",
                "mean",
            )
    assert panels["Cumulative dollars by sweep"]["groupBy"] == "cost.value.sweep"
    assert panels["Cumulative dollars by sweep"]["groupAgg"] == "max"
    assert panels["Dollars by sweep, all runs shown"]["groupAgg"] == "sum"
    (runs,) = content["spec"]["section"]["runSets"]
    best_first = {"key": {"section": "summary", "name": "cost/bits_per_byte_per_usd"}, "ascending": False}
    assert runs["sort"]["keys"] == [best_first]
    assert runs["runFeed"]["columnOrder"][:2] == ["run:displayName", "summary:cost/bits_per_byte_per_usd"]


def test_every_metric_and_setting_the_workspace_names_is_one_that_a_run_has(sweep: Sweep) -> None:
    content = dry(sweep.commands)
    logged = {name for row in sweep.commands.metrics("run1") for name in row}
    some = dict.fromkeys(KINDS, 1.0)
    exchanged = Exchanged(some, some, some, steps=1.0).metrics()
    run = next(iter(sweep.server.runs.values()))
    config = {key: entry.get("value") for key, entry in json.loads(run["config"]).items()}
    for panel in shown(content).values():
        named = {*panel["metrics"], *([panel["xAxis"]] if "xAxis" in panel else [])} - {"_timestamp"}  # wandb's own
        assert named <= logged
        if panel.get("useMetricRegex"):
            several = panel["metricRegex"].startswith("comm/")  # which one process does not log
            found = [name for name in (exchanged if several else logged) if re.fullmatch(panel["metricRegex"], name)]
            assert len(found) == (len(KINDS) if "w+" in panel["metricRegex"] else 1), panel  # one layer has experts
        else:
            assert panel["metrics"]
        if "groupBy" in panel:
            top, value, key = panel["groupBy"].split(".")
            assert value == "value"
            assert key in config[top]
    (runs,) = content["spec"]["section"]["runSets"]
    columns = runs["runFeed"]["columnOrder"][1:]
    assert {c.removeprefix("summary:") for c in columns if c.startswith("summary:")} <= logged
    for column in (c.removeprefix("config:") for c in columns if c.startswith("config:")):
        top, key = column.split(".")
        assert key in config[top], column


def test_it_is_made_once_renewed_after_that_and_nobody_elses_is_touched(
    commands: Commands, server: WandbServer
) -> None:
    other = {"id": "theirs", "name": "nw-0a1b2c3d4e5-v", "displayName": "Cost", "projectName": "p", "spec": "{}"}
    server.views.append(dict(other))
    first = commands.run(*SCRIPT, "project=p").stdout
    assert first == f"workspace Cost created: {server.environment['WANDB_BASE_URL']}/me/p?nw=moetraincost\n"
    ours = server.views[1]
    spec = json.loads(ours["spec"])

    # Somebody adds a section and a filter there, and changes one of ours.
    bank = spec["section"]["panelBankConfig"]
    bank["sections"].insert(0, {**bank["sections"][0], "name": "My own"})
    bank["sections"][1]["panels"] = []
    chosen = {"filterFormat": "filterV2", "filters": [{"connector": None, "key": {"section": "run", "name": "state"}}]}
    chosen["filters"][0] |= {"op": "=", "value": "finished", "meta": None, "disabled": False}  # type: ignore[index]
    spec["section"]["runSets"][0]["filters"] = chosen
    ours["spec"] = json.dumps(spec)
    second = commands.run(*SCRIPT, "project=p").stdout
    assert second.startswith("workspace Cost renewed (its own sections; what was added or filtered there stays): http")
    assert len(server.views) == 2
    assert server.views[0] == other
    renewed = json.loads(server.views[1]["spec"])["section"]
    names = [section["name"] for section in renewed["panelBankConfig"]["sections"]]
    assert names == ["Loss", "Cost and speed", "Spending", SEVERAL, "Expert load by layer", "My own"]
    assert [len(section["panels"]) for section in renewed["panelBankConfig"]["sections"]] == [4, 4, 2, 3, 3, 4]
    assert renewed["runSets"][0]["filters"] == chosen

    commands.run(*SCRIPT, "project=q", "entity=team")
    assert [(view["projectName"], view.get("entityName")) for view in server.views[1:]] == [("p", "me"), ("q", "team")]


def test_what_cannot_be_done_is_one_line_with_the_remedy(commands: Commands, server: WandbServer) -> None:
    def line(*arguments: str, status: int = 1) -> str:
        result = commands.run(*SCRIPT, *arguments, check=False)
        assert result.returncode == status, result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
        assert result.stdout == ""
        return result.stderr

    assert "entity=a/b: give one name, as in wandb.ai/ENTITY/PROJECT" in line("entity=a/b", status=2)
    assert "did you mean project=?" in line("projekt=x", status=2)
    server.no_project = True
    assert "there is no project me/nowhere in wandb, or no access to it" in line("project=nowhere")
    server.mode = "denies"
    assert "check entity=team, project=p and the network, or see it with dry_run=true" in line(
        "entity=team", "project=p"
    )
    del commands.environment["WANDB_API_KEY"]
    assert "wandb finds no API key: run `wandb login`, or see the workspace with dry_run=true" in line()
    assert server.views == []
