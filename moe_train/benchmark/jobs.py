"""Runs of the real command for a benchmark: in a folder that is thrown away, in nobody's ledger."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from moe_train.errors import UserError
from moe_train.launch import start_job

PATIENCE_SECONDS = 10.0  # of an interrupted benchmark, for a run to end by itself


def finished_job(overrides: Sequence[str], folder: Path) -> Path:
    """The run folder, in `folder`, of `train.py OVERRIDES`. Raises UserError with the last line of one that failed."""
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    said = folder / f"{run.parent.name}.txt"
    own = [f"run_dir={run}", f"cost.ledger={folder}/ledger.jsonl", "cost.purpose=tuning", "resume=null"]
    with said.open("w") as output:
        job = start_job([*overrides, *own], output, {}, accelerate=True)
        try:
            status = job.wait()
        except BaseException:  # a signal above all
            _end(job)
            raise
    if status:
        lines = [line for line in said.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1].removeprefix("error: ") if lines else "it said nothing"
        raise UserError(f"train.py ended with exit status {status}: {last}")
    return run


def _end(job: subprocess.Popen[str]) -> None:
    """End the launcher and all that it started, before their folder goes."""
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
