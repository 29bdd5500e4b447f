"""Where a number goes: one line of metrics.jsonl a logged step, and the same row to wandb.

metrics.jsonl is the record; it needs no account, no network and no reader of its own. A resumed run goes on in the same
file from its checkpoint's step, so every step stands there once.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from moe_train.config import TrackingConfig
from moe_train.errors import UserError
from moe_train.tracking.wandb_run import UPLOAD_SECONDS, WandbRun, start_wandb

_LEAST_SECONDS = 1.0  # for wandb at the end, which takes a tenth of that where all is well


class Tracker:
    """Writes a run's metrics into `run_folder` and to wandb as `config` says. Only rank 0 makes one.

    `run_config` is the resolved configuration, `run_id` names the run in wandb (the same after a resume), `resume_step`
    is the last step the checkpoint has seen: rows beyond it are dropped, for they will be made again.
    Raises UserError where metrics of another run would be overwritten, where metrics.jsonl is damaged, and where
    tracking.wandb=online finds no API key.
    """

    def __init__(
        self,
        run_folder: Path,
        config: TrackingConfig,
        run_config: dict[str, Any],
        run_name: str,
        run_id: str,
        resume_step: int | None,
    ) -> None:
        path = run_folder / "metrics.jsonl"
        if resume_step is None and path.exists():
            raise UserError(
                f"{path} holds the metrics of an earlier run: go on with resume=auto or choose another run_dir"
            )
        if resume_step is not None and path.exists():
            _drop_rows_after(path, resume_step)
        self._last_step = resume_step
        self._wandb: WandbRun | None = start_wandb(run_folder, config, run_config, run_name, run_id)
        self._file = path.open("a", encoding="utf-8")

    @property
    def wandb_location(self) -> str | None:
        """The run's address in wandb; its folder where it is offline or was not sent whole; None without wandb."""
        return self._wandb.location if self._wandb else None

    def log(self, step: int, metrics: dict[str, float | None]) -> None:
        """Record all metrics of `step`, once; None and numbers that are not finite become null."""
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"step {step} is logged after step {self._last_step}: a step is logged once, in order")
        self._last_step = step
        row = {name: value if value is None or math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        if self._wandb:
            self._wandb.log(step, row)

    def finish(self, summary: dict[str, Any], seconds_left: float | None = None) -> None:
        """Close metrics.jsonl; wandb gets `summary` as the run's results. `seconds_left`: to a limit of the run."""
        self._file.close()
        if self._wandb:
            left = UPLOAD_SECONDS if seconds_left is None else min(UPLOAD_SECONDS, seconds_left)
            self._wandb.finish(summary, max(left, _LEAST_SECONDS))


def _drop_rows_after(path: Path, last_step: int) -> None:
    """Keep the rows up to `last_step`. A killed run may have left half a last line, which is dropped too."""
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise UserError(f"{path}, line {number} is not a row of metrics: move the file away to go on") from None
    temporary = path.with_suffix(".jsonl.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
