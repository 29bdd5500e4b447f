"""configs/wandb/ as `wandb agent` would use it: its own code builds the command, and the command trains."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import wandb
from command_line import ROOT, Commands
from wandb import wandb_agent
from wandb.sdk.launch.sweeps.utils import load_sweep_config

from moe_train.compose import compose_unchecked

FILES = sorted((ROOT / "configs/wandb").glob("*.yaml"))
SWEEP, RUN = "abc12345", "run54321"


def sweep_of(file: Path) -> dict[str, Any]:
    content: dict[str, Any] | None = load_sweep_config(str(file))
    assert content is not None
    return content


def values_of(parameter: dict[str, Any]) -> list[Any]:
    return parameter["values"] if "values" in parameter else [parameter["min"], parameter["max"]]


def command_of_an_agent(sweep: dict[str, Any], folder: Path, monkeypatch: Any) -> tuple[list[str], dict[str, str]]:
    """What wandb's agent starts, and in which environment, when its server asks for a run."""
    started: list[tuple[list[str], dict[str, str]]] = []

    class Recorded:
        def __init__(self, command: list[str], env: dict[str, str], forward_signals: bool) -> None:
            started.append((command, env))

    monkeypatch.chdir(folder)
    monkeypatch.setattr(wandb_agent, "AgentProcess", Recorded)
    monkeypatch.setenv(wandb.env.SWEEP_ID, SWEEP)
    for name in (wandb.env.RUN_ID, wandb.env.SWEEP_PARAM_PATH):  # the agent sets them: put back afterwards
        monkeypatch.setenv(name, "")
    monkeypatch.setenv(wandb.env.DIR, str(folder))
    agent = wandb_agent.Agent.__new__(wandb_agent.Agent)
    agent._in_jupyter, agent._function, agent._forward_signals = False, None, False
    agent._sweep_command, agent._run_processes = sweep["command"], {}
    args = {name: {"value": values_of(parameter)[0]} for name, parameter in sweep["parameters"].items()}
    agent._command_run({"args": args, "run_id": RUN, "program": sweep["program"]})
    return started[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_parameter_of_a_sweep_is_a_setting_of_train(file: Path) -> None:
    sweep = sweep_of(file)
    assert {"program", "method", "metric", "parameters", "command"} <= set(sweep)
    fixed = [word for word in sweep["command"] if "=" in word and not word.startswith(("-", "$"))]
    for name, parameter in sweep["parameters"].items():
        for value in values_of(parameter):
            compose_unchecked([*fixed, f"{name}={value}"])
    assert (ROOT / sweep["program"]).exists()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_command_of_an_agent_trains_and_logs_what_the_sweep_looks_at(
    file: Path, commands: Commands, monkeypatch: Any
) -> None:
    sweep = sweep_of(file)
    command, environment = command_of_an_agent(sweep, commands.folder, monkeypatch)
    assert command[:3] == ["/usr/bin/env", "accelerate", "launch"]
    for name, parameter in sweep["parameters"].items():
        assert f"{name}={values_of(parameter)[0]}" in command
    # Without its server: offline, on the tiny text and model.
    own = [word.partition("=")[0] for word in command]
    tiny = [o for o in commands.tiny if o.partition("=")[0] not in own and not o.startswith("tracking=")]
    words = [word.replace("tracking.wandb=online", "tracking.wandb=offline") for word in command]
    words[words.index("train.py")] = str(ROOT / "train.py")
    result = subprocess.run(
        [*words, *tiny, "run_dir=run"],
        cwd=commands.folder,
        env={**environment, **commands.environment, **{k: v for k, v in environment.items() if k.startswith("WANDB_")}},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert sweep["metric"]["name"] in commands.metrics("run")[-1]
    # The run is the one that the agent was asked for, or its server would wait for it in vain.
    assert list((commands.folder / "run/wandb").glob(f"offline-run-*-{RUN}/run-{RUN}.wandb"))
