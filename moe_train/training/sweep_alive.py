"""A run whose dollars a sweep holds ends with that sweep, with a checkpoint.

A sweep that is killed can tell its jobs nothing any more, and they know of no limit of their own (cost/budget.py says
why). So each looks once a second whether the sweep is still there, by its process and when that began. The same command
goes on from the checkpoints, within the same budget.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import psutil

HELD_BY = "MOE_TRAIN_BUDGET_HELD_BY"  # in a job's environment: PID,MOMENT of its sweep
LOOK_SECONDS = 1.0


def held_by_this_process() -> dict[str, str]:
    """What a sweep sets in the environment of jobs that are to end with it."""
    return {HELD_BY: f"{os.getpid()},{psutil.Process().create_time()!r}"}


def end_with_sweep() -> None:
    """Where a sweep holds the budget: from now on, SIGTERM to this process once the sweep is gone."""
    held_by = os.environ.get(HELD_BY)
    if held_by:
        threading.Thread(target=_look, args=(held_by,), daemon=True).start()


def _look(held_by: str) -> None:
    while is_alive(held_by):
        time.sleep(LOOK_SECONDS)
    sys.stderr.write("note: the sweep that holds budget.usd is gone: this run ends with a checkpoint\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGTERM)


def is_alive(held_by: str) -> bool:
    """Whether the very process still runs: another may have been given its number."""
    pid, _, began = held_by.partition(",")
    try:
        process = psutil.Process(int(pid))
        return repr(process.create_time()) == began and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
