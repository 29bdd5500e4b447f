"""One run as a job of SLURM, through submitit: a task a process, queued again when it is pre-empted or its time is up.

SLURM warns submitit's tasks with a signal (USR2). The first then has its process save the step (SIGTERM, on which all
processes agree), waits for the end and queues the job again, which goes on with resume=auto. Needs the extra `slurm`.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from moe_train.compose import compose_run
from moe_train.errors import UserError, one_line
from moe_train.launch import TRAIN

if TYPE_CHECKING:
    import submitit

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 120  # between the warning and the end: the step in progress, its checkpoint, the tracker
_INTERRUPTED = 128 + signal.SIGTERM


@dataclasses.dataclass
class Job:
    """What is asked of the cluster."""

    nodes: int
    processes_per_node: int
    gpus_per_node: int
    hours: float
    partition: str | None
    cluster: str  # slurm, or local: on this machine, to try it


class Task:
    """What every task of a job does: be one process of the run."""

    def __init__(self, overrides: list[str]) -> None:
        self.overrides = overrides
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        import submitit

        here = submitit.JobEnvironment()
        variables = {
            "RANK": here.global_rank,
            "LOCAL_RANK": here.local_rank,
            "WORLD_SIZE": here.num_tasks,
            "LOCAL_WORLD_SIZE": here.num_tasks // here.num_nodes,
            "MASTER_ADDR": here.hostnames[0],
            "MASTER_PORT": 20000 + int(here.raw_job_id.split("_")[0]) % 20000,
        }
        # The warning reaches whole process groups; what it means is told to the process by this one.
        signal_before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        self._process = subprocess.Popen(
            [sys.executable, str(TRAIN), *self.overrides],
            env={**os.environ, **{name: str(value) for name, value in variables.items()}},
            restore_signals=False,
        )
        signal.signal(signal.SIGUSR2, signal_before)
        status = self._wait()
        # Where the first has been warned, it is queuing the job again and not here; the others have nothing to add.
        if status and not (status == _INTERRUPTED and here.global_rank != 0):
            raise RuntimeError(f"process {here.global_rank} ended with status {status}: see what it said above")

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit in the first task when the job is to make room; returns what is queued."""
        import submitit

        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._wait()
        return submitit.helpers.DelayedSubmission(Task(self.overrides))

    def _wait(self) -> int:
        # Not Popen.wait: the warning comes in the middle of it, and a second one inside would wait for the first.
        assert self._process is not None
        while (status := self._process.poll()) is None:
            time.sleep(_POLL_SECONDS)
        return status


def submit(overrides: list[str], job: Job) -> tuple[submitit.Job[None], Path]:
    """Queue the run that `python train.py OVERRIDES…` would make; returns the job and the folder of what it says.

    Raises UserError: the run's settings are wrong, it has no folder, or the cluster does not take it.
    """
    try:
        import submitit
    except ImportError:
        raise UserError('submitit is not installed: pip install -e ".[slurm]"') from None
    config = compose_run(overrides, "slurm")
    if config.run_dir is None:
        raise UserError(
            "run_dir= is missing: give a folder that all nodes reach, in which the run goes on when queued again"
        )
    run_dir = Path(config.run_dir).absolute()
    folder = run_dir.with_name(f"{run_dir.name}-slurm")
    fixed = [f"parallel.processes={job.nodes * job.processes_per_node}", "resume=auto"]
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=job.cluster, slurm_max_num_timeout=1000)
        executor.update_parameters(
            name=run_dir.name,
            nodes=job.nodes,
            tasks_per_node=job.processes_per_node,
            gpus_per_node=job.gpus_per_node,
            timeout_min=max(1, round(60 * job.hours)),
            slurm_signal_delay_s=_GRACE_SECONDS,
            **({"slurm_partition": job.partition} if job.partition else {}),
        )
        return executor.submit(Task([*overrides, *fixed])), folder
    except (RuntimeError, submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise UserError(
            f"cluster={job.cluster} did not take the job ({one_line(error)}): submit where sbatch is, or try it with "
            "cluster=local"
        ) from None
