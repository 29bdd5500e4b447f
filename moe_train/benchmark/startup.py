"""suite=startup: from the command to the first step, with the data prepared."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from moe_train.benchmark.bench import Bench
from moe_train.benchmark.figures import Figure, estimate, measured, not_measured
from moe_train.benchmark.jobs import finished_job
from moe_train.errors import UserError

LAUNCHES = 3
_SETTINGS = (
    "stop={steps: 1, tokens: null, flops: null, seconds: null, usd: null}",
    "eval.max_tokens=4096",
    "checkpoint.every_steps=null",
)


def run(bench: Bench) -> list[Figure]:
    """The run's own clock, which begins with the launcher's process; the first launch prepares the data, unmeasured."""
    seconds = []
    bench.let_go()
    with tempfile.TemporaryDirectory() as folder:
        try:
            for _ in range(1 + LAUNCHES):
                made = finished_job([*bench.overrides(), *_SETTINGS], Path(folder), bench.runtime.device_name)
                summary = json.loads((made / "summary.json").read_text())
                seconds.append(summary["startup_seconds"])
        except UserError as error:
            return [not_measured(bench.suite, "startup_seconds", "s", str(error))]
    of = f"accelerate launch train.py, {bench.config().model.name}"
    return [measured(bench.suite, "startup_seconds", estimate(seconds[1:]), "s", of, "tracking as configured")]
