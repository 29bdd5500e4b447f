"""A run over several nodes as a job of SLURM, queued again when it is pre-empted: settings are those of train.py.

python scripts/slurm.py run_dir=DIR nodes=2 processes_per_node=8 hours=24 [partition=NAME] [KEY=VALUE …]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from moe_train.cli import divide_arguments, parse_arguments, wants_traceback
from moe_train.errors import reported


@dataclass
class Arguments:
    nodes: Annotated[int, Field(ge=1, le=10_000)] = 1
    processes_per_node: Annotated[int, Field(ge=1, le=1_000)] = 8
    gpus_per_node: Annotated[int, Field(ge=0, le=1_000)] | None = None  # as many as processes; 0 on CPUs
    hours: Annotated[float, Field(gt=0, le=10_000)] = 24.0  # after which it is queued again
    partition: str | None = None
    cluster: Literal["slurm", "local"] = "slurm"  # local: on this machine, to try it


def main() -> None:
    own, overrides = divide_arguments(Arguments, sys.argv[1:])
    asked = parse_arguments(Arguments, own, usage=(__doc__ or "").strip().splitlines()[-1])
    from moe_train.slurm import Job, submit

    gpus = asked.processes_per_node if asked.gpus_per_node is None else asked.gpus_per_node
    job, folder = submit(
        overrides, Job(asked.nodes, asked.processes_per_node, gpus, asked.hours, asked.partition, asked.cluster)
    )
    sys.stdout.write(f"job {job.job_id}, what it says is in {folder}\n")


if __name__ == "__main__":
    with reported(wants_traceback()):
        main()
