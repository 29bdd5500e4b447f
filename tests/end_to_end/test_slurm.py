"""The sbatch file, with stand-ins for SLURM's own commands: a pre-empted run is queued again and goes on."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

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


def test_a_pre_empted_run_is_queued_again_and_goes_on(slurm: Commands) -> None:
    job = ["bash", str(ROOT / "cluster/slurm.sbatch"), *slurm.tiny, "parallel=fsdp2"]
    process = slurm.start([*job, "stop.steps=100000"])
    metrics = slurm.folder / "run/metrics.jsonl"
    for _ in range(6000):
        if process.poll() is not None or (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
            break
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1]
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
