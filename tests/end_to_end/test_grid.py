"""`python train.py -m`: one process a job, each run made once, whatever happens to the grid in the meantime."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from command_line import ROOT, Commands


def runs(commands: Commands) -> dict[Any, dict[str, Any]]:
    """Summaries by (seed, whether the model is a mixture)."""
    found = [json.loads(path.read_text()) for path in commands.folder.glob("outputs/runs/*/summary.json")]
    return {(s["seed"], s["total_params"] > s["active_params"]): s for s in found}


def attempts(commands: Commands) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (commands.folder / "outputs/ledger.jsonl").read_text().splitlines()]
    return list({line["id"]: line for line in lines}.values())


def steps_logged(commands: Commands) -> list[int]:
    files = commands.folder.glob("outputs/runs/*/metrics.jsonl")
    return [len(file.read_text().splitlines()) for file in files]


def wait_for_steps(commands: Commands, process: subprocess.Popen[str], jobs: int, steps: int = 20) -> None:
    while sum(logged >= steps for logged in steps_logged(commands)) < jobs:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_a_grid_is_a_process_a_job_and_a_larger_one_makes_what_is_missing(commands: Commands) -> None:
    grid = commands.train_command("-m", "stop.steps=2", "model=nano,dense_nano", "tracking.wandb=off")
    commands.run(*grid, "seed=0")
    assert set(runs(commands)) == {(0, True), (0, False)}
    second = commands.run(*grid, "seed=0,1", "hydra.launcher.jobs=2")
    assert set(runs(commands)) == {(0, True), (0, False), (1, True), (1, False)}
    assert "2 of 4 runs are there already" in second.stderr
    assert len(attempts(commands)) == 4
    table = json.loads(max(commands.folder.glob("outputs/grids/*/jobs.json")).read_text())
    assert [line["status"] for line in table["jobs"]] == ["there already", "finished"] * 2
    for line in table["jobs"]:
        assert line["hash"] in second.stdout
        assert json.loads(Path(line["folder"], "summary.json").read_text())["val_loss"] == line["val_loss"]
        assert "bits per byte" in Path(line["log"]).read_text()


def test_a_job_that_fails_does_not_end_the_rest(commands: Commands) -> None:
    diverging = "model.initializer_range=1e20,0.02"
    result = commands.run(*commands.train_command("-m", "stop.steps=2", "model.moe.top_k=99,1", diverging), check=False)
    assert result.returncode == 1
    assert "cannot be made: model.moe.top_k=99 model.initializer_range=0.02: " in result.stderr
    assert "top_k=99 is more than num_experts=8" in result.stderr
    assert "3 of 4 jobs failed:" in result.stderr
    assert re.search(r"exit status 1: model\.moe\.top_k=1 model\.initializer_range=1e\+20: the loss is ", result.stderr)
    assert len(runs(commands)) == 1


def test_ctrl_c_ends_all_jobs_with_a_checkpoint_and_the_same_command_goes_on(commands: Commands) -> None:
    grid = commands.train_command("-m", "seed=0,1", "stop.steps=400", "hydra.launcher.jobs=2")
    process = commands.start(grid)
    wait_for_steps(commands, process, jobs=2)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate()
    assert process.returncode == 130
    assert "2 jobs were ended and go on with the same command, from the last checkpoint if any" in errors
    assert "Traceback" not in errors
    assert out.count("ended") == 2
    assert [attempt["status"] for attempt in attempts(commands)] == ["interrupted"] * 2
    done = steps_logged(commands)
    commands.run(*grid)
    assert set(runs(commands)) == {(0, True), (1, True)}
    logs = "".join(path.read_text() for path in commands.folder.glob("outputs/runs/*.log"))
    assert logs.count("going on from step") == 2
    assert all(f"going on from step {steps} " in logs for steps in done)


def test_a_killed_grid_goes_on_beside_the_job_that_outlived_it(commands: Commands) -> None:
    grid = commands.train_command("-m", "seed=0,1", "stop.steps=600", "hydra.launcher.jobs=1")
    process = commands.start(grid)
    wait_for_steps(commands, process, jobs=1)
    process.kill()
    process.communicate()
    (noted,) = commands.folder.glob("outputs/runs/*.json")
    job = psutil.Process(json.loads(noted.read_text())["pid"])
    job.suspend()  # however slow the second grid starts, the job is there
    second = commands.start(grid)
    assert second.stderr is not None
    assert any("is being made by another process: waiting for it" in line for line in second.stderr)
    job.resume()
    second.communicate()
    assert second.returncode == 0
    assert len(attempts(commands)) == 2  # the job that outlived the first grid was not made again
    assert set(runs(commands)) == {(0, True), (1, True)}


def test_the_jobs_of_a_killed_grid_end_with_a_checkpoint_where_it_held_their_budget(commands: Commands) -> None:
    grid = commands.train_command("-m", "seed=0", "stop.steps=100_000", "budget.usd=1")
    process = commands.start(grid)
    wait_for_steps(commands, process, jobs=1)
    process.kill()
    process.communicate()
    (noted,) = commands.folder.glob("outputs/runs/*.json")
    psutil.Process(json.loads(noted.read_text())["pid"]).wait(timeout=60)
    (attempt,) = attempts(commands)
    assert attempt["status"] == "interrupted"
    assert list(commands.folder.glob("outputs/runs/*/checkpoints/step_*"))
    (log,) = commands.folder.glob("outputs/runs/*.log")
    assert "the sweep that holds budget.usd is gone: this run ends with a checkpoint" in log.read_text()


def test_jobs_of_several_processes_and_an_architecture_of_ones_own(commands: Commands) -> None:
    (commands.folder / "own/model").mkdir(parents=True)
    nano = yaml.safe_load((ROOT / "configs/model/nano.yaml").read_text())
    (commands.folder / "own/model/mine.yaml").write_text("# mine\n" + yaml.safe_dump(nano | {"rms_norm_eps": 1e-4}))
    settings = ["model=mine", "seed=0", "stop.steps=2", "hydra.launcher.processes=2"]
    commands.environment["ACCELERATE_USE_CPU"] = "1"
    commands.run(*commands.train_command("--config-dir", "own", "-m", *settings))
    (summary,) = runs(commands).values()
    assert summary["num_devices"] == 2
    (folder,) = commands.folder.glob("outputs/runs/*/config.yaml")
    assert yaml.safe_load(folder.read_text())["model"]["rms_norm_eps"] == 1e-4
