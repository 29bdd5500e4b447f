"""What `python train.py -m key=a,b` does with its grid: one launched job each, one after another.

hydra finds this module by the name of its package and knows it as `hydra/launcher=accelerate`. A job that fails does
not end the rest; a list at the end says which did, and the command then exits with status 1. With `budget.usd` the jobs
share what is left of it, and none is started that it cannot pay for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from moe_train.cost.budget import Budget
from moe_train.errors import UsageError, UserError
from moe_train.launch import launch_job


class AccelerateLauncher(Launcher):
    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """hydra's hook before a sweep: what all jobs share."""
        self.budget = Budget.of_a_grid(config.cost, config.budget)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError(
                "-m starts its own jobs: run it with python train.py -m, not under torchrun or accelerate launch"
            )
        if len(job_overrides) > 1 and any(o.startswith("run_dir=") for o in job_overrides[0]):
            raise UserError(
                "run_dir= cannot be shared by the jobs of a grid: leave it out, each job gets a folder of its own"
            )
        if self.budget.usd is not None and any(o.startswith("cost.sweep=") for o in job_overrides[0]):
            sweeps = {o for overrides in job_overrides for o in overrides if o.startswith("cost.sweep=")}
            if len(sweeps) > 1:
                raise UserError("budget.usd= is of one sweep: give cost.sweep one value")
        if not job_overrides:
            raise UsageError("the grid is empty: a key has no value to take")
        statuses: list[int] = []
        for index, overrides in enumerate(job_overrides):
            if refusal := self.budget.refusal(overrides):
                sys.stderr.write(f"\n{refusal}: {len(job_overrides) - index} of {len(job_overrides)} not started:\n")
                sys.stderr.write("".join(f"  {' '.join(left)}\n" for left in job_overrides[index:]))
                break
            sys.stderr.write(f"\n[{index + 1}/{len(job_overrides)}] {' '.join(overrides) or 'defaults'}\n")
            statuses.append(launch_job([*overrides, *self.budget.overrides()]))
        failed = [
            f"  exit status {status}: {' '.join(overrides)}"
            for status, overrides in zip(statuses, job_overrides)
            if status
        ]
        if failed:
            sys.stderr.write("\n".join([f"{len(failed)} of {len(statuses)} jobs failed:", *failed]) + "\n")
        if failed or len(statuses) < len(job_overrides):
            sys.exit(1)
        return [JobReturn(overrides=o, status=JobStatus.COMPLETED, _return_value=None) for o in job_overrides]


ConfigStore.instance().store(
    group="hydra/launcher",
    name="accelerate",
    node={"_target_": f"{__name__}.AccelerateLauncher"},
    provider="moe_train",
)
