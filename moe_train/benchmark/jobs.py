"""Runs of the real command for a benchmark: in a folder that is thrown away, in nobody's ledger."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from moe_train.errors import UserError
from moe_train.launch import launch_job
from moe_train.sweeps.runs import last_words
from moe_train.training.run_folder import SUMMARY


def finished_job(overrides: Sequence[str], folder: Path, device: str) -> Path:
    """The run folder, in `folder`, of `train.py OVERRIDES`, made on `device` (its name) as all else that is measured.

    Raises UserError: with the last line of one that failed, or where accelerate's configuration sent it elsewhere.
    """
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    said = folder / f"{run.parent.name}.txt"
    own = [f"run_dir={run}", f"cost.ledger={folder}/ledger.jsonl", "cost.purpose=tuning", "resume=null"]
    with said.open("w") as output:
        status = launch_job([*overrides, *own], output)
    if status:
        raise UserError(f"train.py ended with exit status {status}: {last_words(said)}")
    made_on = json.loads((run / SUMMARY).read_text())["device_name"]
    if made_on != device:
        raise UserError(
            f"accelerate launch made the run on {made_on}, and this is measured on {device}: see what `accelerate env` "
            "says, and start it without an accelerate configuration"
        )
    return run
