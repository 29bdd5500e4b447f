"""Clusters, as far as one machine shows them: submitit's local executor, a stand-in for srun, SkyPilot's own schema."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from typing import Any

import psutil
import pytest
import yaml
from command_line import ROOT, Commands

CLUSTER = ROOT / "cluster"


def on_a_cluster(commands: Commands, *arguments: str) -> list[str]:
    """`resume=auto` makes it safe to give the same command again."""
    return commands.train_command("-m", "hydra/launcher=submitit_local", "resume=auto", *arguments)


def summaries(commands: Commands) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in commands.folder.glob("outputs/20*/*/summary.json")]


def test_jobs_of_a_cluster_are_made_once(commands: Commands) -> None:
    commands.run(*on_a_cluster(commands, "seed=0"))
    commands.run(*on_a_cluster(commands, "seed=0,1"))
    assert sorted(summary["seed"] for summary in summaries(commands)) == [0, 1]
    ledger = (commands.folder / "outputs/ledger.jsonl").read_text().splitlines()
    assert len({json.loads(line)["id"] for line in ledger}) == 2


def test_a_preempted_job_is_requeued_and_goes_on_from_its_checkpoint(commands: Commands) -> None:
    settings = ["seed=0", "stop.steps=100", "checkpoint.every_steps=20"]
    process = commands.start(on_a_cluster(commands, *settings))
    while not list(commands.folder.glob("outputs/20*/*/checkpoints/step_20/state.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    # The job's process, two below ours: its controller waits for it.
    (job,) = [
        child
        for child in psutil.process_iter(["cmdline", "cwd"])
        if "submitit.core._submit" in (child.info["cmdline"] or []) and child.info["cwd"] == str(commands.folder)
        if child.parent() is not None and "submitit.local._local" in child.parent().cmdline()
    ]
    job.send_signal(signal.SIGUSR2)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    (summary,) = summaries(commands)
    assert (summary["status"], summary["steps"]) == ("finished", 100)
    said = "".join(file.read_text() for file in commands.folder.glob("outputs/grids/*/.submitit/*/*.err"))
    assert "going on from step" in said
    lines = (commands.folder / "outputs/ledger.jsonl").read_text().splitlines()
    attempts = list({line["id"]: line for line in map(json.loads, lines)}.values())
    assert [attempt["status"] for attempt in attempts] == ["interrupted", "finished"]
    assert attempts[1]["lost_seconds"] == 0  # it was saved after the step in progress


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model.initializer_range=1e20"], "error: the loss is "),
        (["budget.usd=5"], "budget.usd=5.0 is held over all jobs by hydra/launcher=accelerate alone: give each job"),
        (["hydra/launcher=submitit_slurm"], "there is no SLURM on this machine (no srun)"),
        (["model.moe.top_k=99"], "top_k=99 is more than num_experts=8"),
    ],
)
def test_what_goes_wrong_on_a_cluster_is_one_line(arguments: list[str], says: str, commands: Commands) -> None:
    words = [w for w in on_a_cluster(commands) if not (w.startswith("hydra/") and "hydra/launcher" in arguments[0])]
    result = commands.run(*words, *arguments, check=False)
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert says in line
    assert "Traceback" not in result.stderr


def test_tasks_that_do_not_know_each_other_are_refused(commands: Commands) -> None:
    commands.environment["SLURM_STEP_NUM_TASKS"] = "2"
    result = commands.train(check=False)
    assert result.returncode == 1
    assert "srun started 2 tasks, each of which would make this run: give it one task a node" in result.stderr


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node SLURM_STEP_NUM_TASKS=$SLURM_NNODES "$@" & done
for job in $(jobs -p); do wait $job || exit 1; done
"""


def test_the_example_for_several_nodes_makes_one_run_of_all_their_processes(commands: Commands) -> None:
    tools = commands.folder / "bin"
    tools.mkdir()
    (tools / "srun").write_text(SRUN)
    (tools / "scontrol").write_text("#!/bin/bash\necho 127.0.0.1\necho 127.0.0.1\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    (commands.folder / "train.py").symlink_to(ROOT / "train.py")
    slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": str(os.getpid())}
    commands.environment |= {**slurm, "SLURM_JOB_NODELIST": "node[0-1]", "ACCELERATE_USE_CPU": "1"}
    commands.environment["PATH"] = f"{tools}{os.pathsep}{commands.environment['PATH']}"
    for expected in ("run folder", "this run is finished already"):  # given again, as when SLURM requeues it
        result = commands.run("bash", str(CLUSTER / "accelerate.sbatch"), *commands.tiny)
        assert expected in result.stderr
    summary = commands.summary(f"outputs/slurm/{os.getpid()}")
    assert (summary["num_devices"], summary["status"]) == (2, "finished")


def test_the_skypilot_file_ends_the_bill_by_itself_and_its_command_trains(commands: Commands) -> None:
    content = yaml.safe_load((CLUSTER / "skypilot_one_gpu.yaml").read_text())
    assert content["resources"]["autostop"] == {"idle_minutes": 10, "down": True}
    assert content["setup"].strip() == 'pip install -e ".[gpu]"'
    # Its own words, on this machine: for a rented one it has the working directory and a bucket.
    run = content["run"].replace("/outputs", f"{commands.folder}/bucket")
    (commands.folder / "bucket").mkdir()
    (commands.folder / "train.py").symlink_to(ROOT / "train.py")
    settings = {"SETTINGS": " ".join([*commands.tiny, "stop.steps=3"]), "MOE_TRAIN_PRICE_USD_PER_HOUR": "1.25"}
    environment = {**commands.environment, **content["envs"], **settings}
    subprocess.run(["bash", "-euc", run], cwd=commands.folder, env=environment, check=True, capture_output=True)
    (file,) = (commands.folder / "bucket").glob("20*/*/summary.json")
    assert json.loads(file.read_text())["price_usd_per_hour"] == 1.25


def test_the_skypilot_file_is_valid_by_skypilots_own_schema() -> None:
    schemas = pytest.importorskip("sky.utils.schemas")
    jsonschema = pytest.importorskip("jsonschema")
    content = yaml.safe_load((CLUSTER / "skypilot_one_gpu.yaml").read_text())
    jsonschema.validate(content, schemas.get_task_schema())
    jsonschema.validate(content["resources"], schemas.get_resources_schema())
