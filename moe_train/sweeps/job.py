"""A run that is to be made, and how it ended."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from moe_train.config import RunConfig


@dataclass(frozen=True)
class Job:
    """`train.py OVERRIDES SETTINGS`; `settings` are no part of what the run is: its name, tags, what it is for."""

    label: str  # for people
    overrides: tuple[str, ...]
    config: RunConfig
    settings: tuple[str, ...] = ()

    @cached_property
    def hash(self) -> str:
        return self.config.config_hash()


Status = Literal[
    "finished",
    "there already",  # finished earlier: nothing was done
    "failed",
    "ended",  # told to, with a checkpoint
]


@dataclass(frozen=True)
class Outcome:
    """`says`: why there is no result, where there is none."""

    job: Job
    status: Status
    exit_status: int | None = None
    says: str | None = None

    @property
    def has_result(self) -> bool:
        return self.status in ("finished", "there already")


def once(jobs: Iterable[Job]) -> list[Job]:
    """Each run once, in the order given."""
    found: dict[str, Job] = {}
    for job in jobs:
        found.setdefault(job.hash, job)
    return list(found.values())
