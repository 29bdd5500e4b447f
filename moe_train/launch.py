"""How one training job starts: as a process of its own, through `accelerate launch` or without it.

A process of its own, because threads, precision and determinism are set once per process and a job that fails must not
take others with it. Sweeps and claims start their jobs here too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

TRAIN = Path(__file__).resolve().parent.parent / "train.py"


def launch_job(overrides: Sequence[str]) -> int:
    """Run `train.py` with the overrides in one process on the devices there are; returns its exit status."""
    command = [sys.executable, *_accelerate(1), str(TRAIN), *overrides]
    return subprocess.run(command, env=_environment(), check=False).returncode


def start_job(
    overrides: Sequence[str],
    output: IO[str],
    environment: Mapping[str, str],
    processes: int = 1,
    accelerate: bool = False,
) -> subprocess.Popen[str]:
    """The same without waiting, and in a process group of its own, so that a Ctrl-C does not reach it by itself.

    One process starts without accelerate's launcher, which settles nothing for it that the run does not settle itself,
    and takes as long to start as the run, unless `accelerate` asks for it. environment: what is set beside ours, e.g.
    the devices the job may see. output: a file for what it says.
    """
    launcher = _accelerate(processes) if accelerate or processes > 1 else []
    command, variables = [sys.executable, *launcher, str(TRAIN), *overrides], {**_environment(), **environment}
    return subprocess.Popen(command, env=variables, stdout=output, stderr=output, text=True, start_new_session=True)


def _accelerate(processes: int) -> list[str]:
    command = ["-m", "accelerate.commands.launch", "--quiet", "--num_machines", "1"]
    command += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    # --multi_gpu starts several processes on a CPU too, where --cpu starts one; port 0: a free one for each job.
    return command if processes == 1 else [*command, "--multi_gpu", "--main_process_port", "0"]


def _environment() -> dict[str, str]:
    # accelerate would set one thread a process; the training runtime shares the cores out itself.
    return {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
