"""A run ends, with a checkpoint, once what looks after it is gone: its launcher, or the sweep that holds its dollars.

Killed, neither can tell its processes anything any more. So each looks once a second whether it is still there, by its
process and when that began, and has itself told to end (signals.py): all processes of the run then agree on it, those
of other machines too, whose launchers live.

A launcher is looked for where one starts several processes (torchrun, or `accelerate launch`, which runs the same
agent): a single process outlives the shell that started it. A sweep's jobs know of no limit of their own
(cost/budget.py says why); the same command goes on from the checkpoints, within the same budget. Not the parent's death
signal: it is sent when a thread ends, and of a sweep a launcher stands between.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import psutil

from moe_train import processes

HELD_BY = "MOE_TRAIN_BUDGET_HELD_BY"  # in a job's environment: PID,MOMENT of its sweep
LOOK_SECONDS = 1.0
_OF_A_LAUNCH = "TORCHELASTIC_RUN_ID"  # set by the launcher for what it starts, and not for itself


def held_by_this_process() -> dict[str, str]:
    """What a sweep sets in the environment of jobs that are to end with it."""
    return {HELD_BY: _identity(os.getpid())}


def end_with_sweep() -> None:
    """Where a sweep holds the budget: from now on, SIGTERM to this process once the sweep is gone."""
    held_by = os.environ.get(HELD_BY)
    if held_by:
        _end_with(held_by, "the sweep that holds budget.usd is gone: this run ends with a checkpoint", _say)


def launcher() -> str | None:
    """The launcher of this process, which is one of several; None where there is none to be seen.

    It is no process of its own launch: between the two may be a script or a profiler (`torchrun --no-python`).
    """
    launch = os.environ.get(_OF_A_LAUNCH)
    if launch is None or os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    above = psutil.Process().parent()
    with contextlib.suppress(psutil.Error):  # what may not be looked into is none of this launch
        while above is not None and above.environ().get(_OF_A_LAUNCH) == launch:
            above = above.parent()
    return None if above is None else _identity(above.pid)


def end_with_launcher(identity: str, say: Callable[[str], None]) -> Callable[[], None]:
    """From now on, SIGTERM to this process once the launcher of that identity is gone. `say`: to this one's log.

    What is returned looks at once, for a process that ends with another which saw it first: each log says why.
    """
    unsaid = threading.Lock()

    def say_twice(line: str) -> None:
        if not unsaid.acquire(blocking=False):
            return
        say(line)
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once a machine
            _say(line)

    line = f"the launcher (process {identity.partition(',')[0]}) is gone: this run ends with a checkpoint"
    _end_with(identity, line, say_twice)

    def look() -> None:
        if not is_alive(identity):
            with contextlib.suppress(OSError, ValueError):
                say_twice(line)

    return look


def _end_with(identity: str, line: str, say: Callable[[str], None]) -> None:
    def look() -> None:
        while is_alive(identity):
            time.sleep(LOOK_SECONDS)
        with contextlib.suppress(OSError, ValueError):  # whoever read it may be gone too
            say(line)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, daemon=True).start()


def _say(line: str) -> None:
    sys.stderr.write(f"note: {line}\n")
    sys.stderr.flush()


def _identity(pid: int) -> str:
    return f"{pid},{processes.began(pid) or ''}"


def is_alive(identity: str) -> bool:
    """Whether the very process still runs: another may have been given its number."""
    pid, _, moment = identity.partition(",")
    return processes.is_alive(int(pid), moment)
