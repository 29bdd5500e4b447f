"""Runs of the real command for a benchmark: in a folder that is thrown away, in nobody's ledger."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from moe_train.errors import UserError
from moe_train.launch import launch_job


def finished_job(overrides: Sequence[str], folder: Path) -> Path:
    """The run folder, in `folder`, of `train.py OVERRIDES`. Raises UserError with the last line of one that failed."""
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    said = folder / f"{run.parent.name}.txt"
    own = [f"run_dir={run}", f"cost.ledger={folder}/ledger.jsonl", "cost.purpose=tuning", "resume=null"]
    with said.open("w") as output:
        status = launch_job([*overrides, *own], output)
    if status:
        lines = [line for line in said.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1].removeprefix("error: ") if lines else "it said nothing"
        raise UserError(f"train.py ended with exit status {status}: {last}")
    return run
