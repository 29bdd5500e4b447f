"""Where a number goes: one line of metrics.jsonl a logged step, and the same row to wandb.

metrics.jsonl is the record; it needs no account, no network and no reader of its own. wandb is a view of it and may
fail (no network, a dead service) without taking the run along. A resumed run goes on in the same file from its
checkpoint's step, so every step stands there once.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from moe_train.config import TrackingConfig
from moe_train.errors import UserError, one_line

if TYPE_CHECKING:
    import wandb

# What loss can be read over; the first is wandb's default axis, the others are chosen in its panels.
_AXES = ("progress/tokens", "progress/flops", "progress/seconds", "cost/usd_total")
_ONLINE_INIT_SECONDS = 30.0
# A rented machine must not wait for ever for an upload; what is missing can be sent later with `wandb sync`.
_UPLOAD_SECONDS = 60.0


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
        self._wandb: wandb.Run | None = None
        try:
            self._wandb = _start_wandb(run_folder, config, run_config, run_name, run_id)
        except UserError:
            raise
        except Exception as error:
            if config.wandb == "online" and type(error).__name__ != "CommError":  # no network is no mistake
                raise UserError(
                    f"tracking.wandb=online cannot start: {one_line(error)}: correct it or use auto"
                ) from error
            self._give_up_wandb(error)
        self._location = _location(self._wandb) if self._wandb else None
        self._file = path.open("a", encoding="utf-8")

    @property
    def wandb_location(self) -> str | None:
        """The run's address if wandb is online, its folder if it is offline, None without wandb."""
        return self._location

    def log(self, step: int, metrics: dict[str, float | None]) -> None:
        """Record all metrics of `step`, once; None and numbers that are not finite become null."""
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"step {step} is logged after step {self._last_step}: a step is logged once, in order")
        self._last_step = step
        row = {name: value if value is None or math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        if self._wandb:
            try:
                self._wandb.log(row, step=step, commit=True)
            except Exception as error:
                self._give_up_wandb(error)

    def finish(self, summary: dict[str, Any]) -> None:
        """Close metrics.jsonl; wandb gets `summary` as the run's results and is waited for."""
        self._file.close()
        if self._wandb:
            try:
                self._wandb.summary.update(summary)
                self._wandb.finish()
            except Exception as error:
                self._give_up_wandb(error)
        self._wandb = None

    def _give_up_wandb(self, error: Exception) -> None:
        self._wandb = None
        _warn(f"wandb failed ({one_line(error)}): metrics go on in metrics.jsonl only")
        _shut_down_wandb()


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


def _start_wandb(
    run_folder: Path, config: TrackingConfig, run_config: dict[str, Any], run_name: str, run_id: str
) -> wandb.Run | None:
    wanted: str = config.wandb
    if wanted == "auto":
        wanted = {"disabled": "off", "offline": "offline", "dryrun": "offline"}.get(
            os.environ.get("WANDB_MODE", ""), "auto"
        )
    if wanted == "off":
        return None
    # wandb sends usage statistics of its own even when offline: where nothing answers, a run would end 10 s later.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb  # 0.4 s, and not needed where tracking.wandb=off

    def start(mode: Literal["online", "offline"]) -> wandb.Run:
        # Given to `init` alone, these settings come too late for wandb's greeting.
        wandb.setup(wandb.Settings(silent=False, show_info=False, show_warnings=False))
        return wandb.init(
            dir=run_folder.resolve(),
            mode=mode,
            project=config.project,
            name=run_name,
            id=run_id,
            group=config.group,
            tags=config.tags,
            notes=config.notes,
            config=run_config,
            resume="allow" if mode == "online" else None,  # offline there is nothing to look up
            settings=_settings(wandb),
        )

    if wanted == "offline":
        run = start("offline")
    elif not _finds_api_key(wandb):
        if wanted == "online":
            raise UserError("tracking.wandb=online finds no API key: run `wandb login`, or set tracking.wandb=offline")
        run = start("offline")
    else:
        try:
            run = start("online")
        except Exception as error:
            if wanted == "online":
                raise
            _warn(f"wandb cannot go online ({one_line(error)}): logging offline")
            _shut_down_wandb()
            run = start("offline")
    for axis in _AXES:
        run.define_metric(axis)
    for metrics in ("train/*", "val/*"):
        run.define_metric(metrics, step_metric=_AXES[0])
    return run


def _finds_api_key(wandb: ModuleType) -> bool:
    """Whether the environment, netrc or wandb's settings hold a key. Nothing is sent and nothing printed."""
    # mode: with WANDB_MODE=offline `login` would not look; silent: else it asks the server whose key it is, to say so.
    wandb.setup(wandb.Settings(mode="online", silent=True))
    return bool(wandb.login(prompt=False, verify=False))


def _settings(wandb: ModuleType) -> Any:
    """Only what we log and the device's own metrics: no output, code, packages, command line, host or git state."""
    return wandb.Settings(
        reinit="create_new",  # a run of its own, whatever else this process does with wandb
        console="off",
        disable_code=True,
        disable_git=True,
        save_code=False,
        show_info=False,
        show_warnings=False,
        init_timeout=_ONLINE_INIT_SECONDS,
        finish_timeout=_UPLOAD_SECONDS,
        finish_timeout_raises=True,
        x_disable_meta=True,
        x_save_requirements=False,
        x_stats_sampling_interval=30.0,
    )


def _location(run: wandb.Run) -> str:
    return str(run.settings.sync_dir) if run.offline else str(run.url)


def _shut_down_wandb() -> None:
    """Without this a service that died ends the process with a traceback at exit."""
    wandb = sys.modules.get("wandb")
    if wandb is not None:
        try:
            wandb.teardown()
        except (Exception, SystemExit):
            return  # it is dead already, and has been reported


def _warn(text: str) -> None:
    sys.stderr.write(f"warning: {text}\n")
