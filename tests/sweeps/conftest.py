"""Jobs that differ in their seed alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moe_train.config import RunConfig
from moe_train.sweeps.job import Job


@pytest.fixture(scope="session")
def job(compose_run: Callable[..., RunConfig]) -> Callable[[int], Job]:
    made: dict[int, Job] = {}

    def make(seed: int) -> Job:
        if seed not in made:
            made[seed] = Job(f"seed={seed}", (f"seed={seed}",), compose_run(f"seed={seed}"))
        return made[seed]

    return make
