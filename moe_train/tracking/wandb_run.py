"""A run's copy in wandb, which may fail without taking the run along.

No network, a service that died, a server that stops answering: the run goes on, says so once and how what is missing
can be sent later, and does not wait for wandb longer than it was told to.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import psutil

from moe_train.config import TrackingConfig
from moe_train.errors import UserError, one_line
from moe_train.tracking.console import sync_command
from moe_train.tracking.wandb_watch import Watch

if TYPE_CHECKING:
    import wandb

# What loss can be read over; the first is wandb's default axis, the others are chosen in its panels.
AXES = ("progress/tokens", "progress/flops", "progress/seconds", "cost/usd_total")
_ONLINE_INIT_SECONDS = 30.0
UPLOAD_SECONDS = 30.0  # a rented machine must not wait for an upload; rows have been sent all along
_LAST_TRY_SECONDS = 5.0  # for a server that has not been answering
_FLUSH_SECONDS = 0.5  # wandb's own file, from which it can be sent later; 15 s would be lost with wandb's process


class WandbRun:
    """A run that wandb has begun."""

    def __init__(self, run: wandb.Run) -> None:
        self._run: wandb.Run | None = run
        self._folder = str(run.settings.sync_dir)
        self._watch = None if run.offline else Watch(run)
        self._warned = False
        self.location = self._folder if run.offline else str(run.url)  # where to look, and what may have to be sent

    def log(self, step: int, row: dict[str, float | None]) -> None:
        """Does not wait for the network."""
        if self._run is None:
            return
        try:
            self._run.log(row, step=step, commit=True)
        except Exception as error:
            self._give_up(error)
            return
        if self._watch and (silence := self._watch.silence()):
            self._warn_once(f"wandb {silence}: the run goes on; if it stays so, `{self._sync}` sends the rest later")

    def finish(self, summary: dict[str, Any], seconds: float) -> None:
        """Give wandb the results and wait until all is sent, no longer than `seconds`."""
        run, failure = self._run, list[Exception]()
        if run is None:
            return

        def finish() -> None:
            try:
                run.summary.update(summary)
                run.finish()
            except Exception as error:
                failure.append(error)

        if self._watch and self._watch.silence(now=True):
            seconds = min(seconds, _LAST_TRY_SECONDS)
        waiting = threading.Thread(target=finish, name="wandb finish", daemon=True)
        waiting.start()
        waiting.join(seconds)
        if failure and not isinstance(failure[0], TimeoutError):
            self._give_up(failure[0])
        elif failure or waiting.is_alive():
            self.location = self._folder
            self._warn_once(f"wandb did not take everything within {seconds:.0f} s: `{self._sync}` sends the rest")
            _end_service()
        self._run = None

    @property
    def _sync(self) -> str:
        return sync_command(self._folder)

    def _give_up(self, error: Exception) -> None:
        self._run, self.location = None, self._folder
        _warn(f"wandb failed ({_reason(error)}): metrics go on in metrics.jsonl only")
        _shut_down()

    def _warn_once(self, text: str) -> None:
        if not self._warned:
            _warn(text)
        self._warned = True


def start_wandb(
    run_folder: Path, config: TrackingConfig, run_config: dict[str, Any], run_name: str, run_id: str
) -> WandbRun | None:
    """Begin a run as `config` says, or go on with it; None without wandb, and with a warning where it cannot begin.

    Raises UserError where tracking.wandb=online finds no API key or wandb refuses the run.
    """
    try:
        run = _start(run_folder, config, run_config, run_name, run_id)
        return WandbRun(run) if run else None
    except UserError:
        raise
    except Exception as error:
        if config.wandb == "online" and type(error).__name__ != "CommError":  # no network is no mistake
            raise UserError(f"tracking.wandb=online cannot start: {_reason(error)}: correct it or use auto") from error
        _warn(f"wandb failed ({_reason(error)}): metrics go on in metrics.jsonl only")
        _shut_down()
        return None


def _start(
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
    elif not finds_api_key(wandb):
        if wanted == "online":
            raise UserError("tracking.wandb=online finds no API key: run `wandb login`, or set tracking.wandb=offline")
        run = start("offline")
    else:
        try:
            run = start("online")
        except Exception as error:
            if wanted == "online":
                raise
            _warn(f"wandb cannot go online ({_reason(error)}): logging offline")
            _shut_down()
            run = start("offline")
    for axis in AXES:
        run.define_metric(axis)
    for metrics in ("train/*", "val/*"):
        run.define_metric(metrics, step_metric=AXES[0])
    return run


def finds_api_key(wandb: ModuleType) -> bool:
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
        finish_timeout=UPLOAD_SECONDS,
        finish_timeout_raises=True,
        x_disable_meta=True,
        x_save_requirements=False,
        x_stats_sampling_interval=30.0,
        x_transaction_log_flush_interval=_FLUSH_SECONDS,
    )


def _shut_down() -> None:
    """Without this a service that died ends the process with a traceback at exit."""
    wandb = sys.modules.get("wandb")
    if wandb is not None:
        try:
            wandb.teardown()
        except (Exception, SystemExit):
            return  # it is dead already, and has been reported


def _end_service() -> None:
    """wandb's own process would hold the end of ours for as long as it goes on trying."""
    for child in psutil.Process().children():
        try:
            if "wandb-core" in child.name():
                child.kill()
                child.wait(5)
        except psutil.Error:
            continue
    _shut_down()


def _reason(error: Exception) -> str:
    return one_line(error) or type(error).__name__


def _warn(text: str) -> None:
    sys.stderr.write(f"warning: {text}\n")
