"""The sbatch file, with stand-ins for SLURM's own commands: a pre-empted run is queued again and goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from command_line import ROOT, Commands

# srun starts every task with its number and ends with the highest status; scontrol knows the hosts and takes orders.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks+=($!)
done
worst=0
for task in "${tasks[@]}"; do wait "$task"; status=$?; ((status > worst)) && worst=$status; done
exit $worst
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >> "$ORDERS"; fi
"""


@pytest.fixture
def slurm(commands: Commands) -> Commands:
    """Commands in a folder with the project's train.py, under a made-up SLURM."""
    folder = commands.folder / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (commands.folder / "train.py").symlink_to(ROOT / "train.py")
    commands.environment["PATH"] = f"{folder}{os.pathsep}{commands.environment['PATH']}"
    commands.environment |= {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "one", "SLURM_NTASKS": "2"}
    commands.environment |= {"SLURM_NNODES": "1", "ORDERS": str(commands.folder / "orders")}
    commands.environment["RUN_DIR"] = str(commands.folder / "run")
    return commands


def wait_for_rows(process: subprocess.Popen[str], metrics: Path) -> None:
    for _ in range(6000):
        if process.poll() is not None or (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
            break
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()


def test_a_pre_empted_run_is_queued_again_and_goes_on(slurm: Commands) -> None:
    job = ["bash", str(ROOT / "cluster/slurm.sbatch"), *slurm.tiny, "parallel=fsdp2"]
    process = slurm.start([*job, "stop.steps=100000"])
    wait_for_rows(process, slurm.folder / "run/metrics.jsonl")
    for log in (slurm.folder / "run/logs").glob("process_*.log"):
        os.kill(int(re.findall(r"pid (\d+)", log.read_text())[0]), signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert (slurm.folder / "orders").read_text() == "requeue 12345\n"
    done = len(slurm.metrics("run"))

    again = slurm.run(*job, f"stop.steps={done + 1}")
    assert f"going on from step {done}" in again.stderr
    assert slurm.summary("run")["steps"] == done + 1
    assert (slurm.folder / "orders").read_text() == "requeue 12345\n"  # it is done: not once more


def test_the_file_for_rented_machines_ends_them_and_takes_the_run_up_again() -> None:
    task = yaml.safe_load(Path(ROOT / "cluster/skypilot.yaml").read_text())
    assert task["resources"]["autostop"]["down"]
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [128 + signal.SIGTERM]
    assert "resume=auto" in task["run"]


def test_a_job_of_submitit_that_has_to_make_room_goes_on_by_itself(commands: Commands) -> None:
    pytest.importorskip("submitit")
    worker = (
        "import sys; from moe_train.slurm import Job, submit\n"
        "job, folder = submit(sys.argv[1:], Job(1, 2, 0, 1.0, None, 'local'))\n"
        "job.results(); print('finished', flush=True)\n"
    )
    settings = ["parallel=ep", "run_dir=run", "stop.steps=150", "checkpoint.every_steps=1000"]
    commands.environment["PYTHONPATH"] = str(ROOT)
    process = commands.start([sys.executable, "-c", worker, *commands.tiny, *settings])
    wait_for_rows(process, commands.folder / "run/metrics.jsonl")
    logs = [log.read_text() for log in (commands.folder / "run/logs").glob("process_*.log")]
    tasks = [psutil.Process(int(re.findall(r"pid (\d+)", log)[0])).parent() for log in logs]
    for task in tasks:
        assert task is not None
        task.send_signal(signal.SIGUSR2)  # SLURM's warning
    said, errors = process.communicate(timeout=120)
    assert said == "finished\n", errors
    assert [row["step"] for row in commands.metrics("run")] == list(range(1, 151))
    attempts = json.loads((commands.folder / "run/ledger.json").read_text())["attempts"]
    found = [(attempt["status"], attempt["num_devices"]) for attempt in attempts]
    assert found == [("interrupted", 2), ("finished", 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nodes=0"], "nodes=0: give a number of at least 1"),
        (["model=nano"], "run_dir= is missing: give a folder that all nodes reach"),
        (["run_dir=run", "optimizer.lrr=1"], "unknown key optimizer.lrr"),
        (["run_dir=run"], "cluster=slurm did not take the job"),
    ],
)
def test_mistakes_are_said_before_anything_is_queued(commands: Commands, arguments: list[str], message: str) -> None:
    pytest.importorskip("submitit")
    result = commands.run(sys.executable, str(ROOT / "scripts/slurm.py"), *arguments, check=False)
    assert result.returncode in (1, 2)
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error:"))
    assert message in line
