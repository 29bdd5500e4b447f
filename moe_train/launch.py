"""How one training job starts: as a process of its own, through `accelerate launch`.

A process of its own, because threads, precision and determinism are set once per process and a job that fails must not
take others with it. Sweeps and claims start their jobs here too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

TRAIN = Path(__file__).resolve().parent.parent / "train.py"


def launch_job(overrides: Sequence[str], output: IO[str] | None = None) -> int:
    """Run `train.py` with the overrides in one process on the devices there are; returns its exit status.

    output: a file for what it says; None: it speaks for itself.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += [
        "--quiet",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    # accelerate would set one thread a process; the training runtime shares the cores out itself.
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    command += [str(TRAIN), *overrides]
    return subprocess.run(command, env=environment, stdout=output, stderr=output, check=False).returncode
