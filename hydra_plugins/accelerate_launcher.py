"""What `python train.py -m key=a,b` does with its grid: `hydra/launcher=accelerate`, one process a job.

hydra finds this module by the name of its package. `hydra.launcher.jobs=N` at a time (by default one a GPU, or as many
as find cores of their own), `hydra.launcher.processes=K` under `accelerate launch` for each; what happens to them is
moe_train/sweeps/grid.py's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from moe_train.errors import UsageError, UserError


class AccelerateLauncher(Launcher):
    def __init__(self, jobs: int | None, processes: int, runs: str) -> None:
        self._jobs, self._processes, self._runs = jobs, processes, Path(runs)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """hydra's hook before a sweep: what all jobs share."""
        self._config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from moe_train.sweeps.grid import Grid, make_grid  # only where there is one

        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError(
                "-m starts its own jobs: run it with python train.py -m, not under torchrun or accelerate launch"
            )
        for key, value in (("jobs", self._jobs), ("processes", self._processes)):
            if value is not None and not (isinstance(value, int) and 1 <= value <= 1024):
                raise UserError(f"hydra.launcher.{key}={value}: give a whole number from 1 to 1024")
        config = self._config
        if config.hydra.job.config_name != "train":
            raise UsageError("-m knows configs/train.yaml alone: leave out --config-name")
        usd = config.budget.usd
        if usd is not None and not (isinstance(usd, int | float) and usd > 0):
            raise UserError(f"budget.usd={usd}: give dollars above 0")
        own = [source.path for source in config.hydra.runtime.config_sources if source.provider == "command-line"]
        grid = Grid(
            jobs=self._jobs,
            processes=self._processes,
            runs=self._runs,
            out=Path(config.hydra.sweep.dir),
            sweep=None if config.cost.sweep is None else str(config.cost.sweep),
            ledger=config.cost.ledger,
            usd=usd,
            config_dir=Path(own[0]) if own else None,
        )
        if not make_grid(job_overrides, grid):
            sys.exit(1)
        return [JobReturn(overrides=o, status=JobStatus.COMPLETED, _return_value=None) for o in job_overrides]


ConfigStore.instance().store(
    group="hydra/launcher",
    name="accelerate",
    node={
        "_target_": f"{__name__}.AccelerateLauncher",
        "jobs": None,  # at a time; null: one a GPU, or as many as num_threads leaves cores for
        "processes": 1,  # of a job, each with a GPU of its own
        "runs": "outputs/runs",  # where run folders are, by hash
    },
    provider="moe_train",
)
