"""How one training job starts: as a process of its own, through `accelerate launch` or without it.

A process of its own, because threads, precision and determinism are set once per process and a job that fails must not
take others with it. Sweeps and claims start their jobs here too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from moe_train.gpu import cpu_is_asked_for

PATIENCE_SECONDS = 10.0  # of a command that is interrupted, for its job to end by itself
TRAIN = Path(__file__).resolve().parent.parent / "train.py"


def launch_job(overrides: Sequence[str], output: IO[str] | None = None) -> int:
    """Run `train.py` with the overrides in one process on the devices there are; returns its exit status.

    What ends the caller meanwhile, a signal above all, ends the job first.
    """
    job = start_job(overrides, output, {}, accelerate=True)
    try:
        return job.wait()
    except BaseException:
        _end(job)
        raise


def start_job(
    overrides: Sequence[str],
    output: IO[str] | None,
    environment: Mapping[str, str],
    processes: int = 1,
    accelerate: bool = False,
) -> subprocess.Popen[str]:
    """The same without waiting, and in a process group of its own, so that a Ctrl-C does not reach it by itself.

    One process starts without accelerate's launcher, which settles nothing for it that the run does not settle itself,
    and takes as long to start as the run, unless `accelerate` asks for it. environment: what is set beside ours, e.g.
    the devices the job may see. output: a file for what it says; None: it is said here.
    """
    launcher = _accelerate(processes) if accelerate or processes > 1 else []
    command, variables = [sys.executable, *launcher, str(TRAIN), *overrides], {**job_environment(), **environment}
    return subprocess.Popen(command, env=variables, stdout=output, stderr=output, text=True, start_new_session=True)


def _end(job: subprocess.Popen[str]) -> None:
    """End the launcher and all that it started, so that their folder can go."""
    started: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        started = psutil.Process(job.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGTERM)
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until and (job.poll() is None or any(map(_lives, started))):
        time.sleep(0.05)
    for process in filter(_lives, started):
        with contextlib.suppress(psutil.Error):
            process.kill()
    job.kill()
    job.wait()


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)  # which nobody may be there to wait for
    except psutil.Error:
        return False


def _accelerate(processes: int) -> list[str]:
    command = ["-m", "accelerate.commands.launch", "--quiet", "--num_machines", "1"]
    command += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    # --multi_gpu starts several processes on a CPU too, where --cpu starts one; port 0: a free one for each job.
    return command if processes == 1 else [*command, "--multi_gpu", "--main_process_port", "0"]


def job_environment() -> dict[str, str]:
    """Of a job, beside what is set for it alone."""
    # accelerate would set one thread a process; the training runtime shares the cores out itself.
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    # Its launcher of one process sets ACCELERATE_USE_CPU anew, to False: a job shall be on the device that we are on.
    return environment | ({"CUDA_VISIBLE_DEVICES": ""} if cpu_is_asked_for() else {})
