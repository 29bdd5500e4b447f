"""Where a run lives: which folder it gets, from which checkpoint it goes on, and that nobody else is writing there.

A run is its configuration and seed, so going on is allowed only where these are the ones the folder was made with; when
it ends, what it evaluates and its precision alone may change. `init_from=PATH` starts a new run from another's weights.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import filelock
import yaml

from moe_train.config import PrecisionConfig, RunConfig, differences, to_dict
from moe_train.errors import UserError
from moe_train.training.checkpoints import STATE, Checkpoint, checkpoint_paths, open_checkpoint

CONFIG, SUMMARY = "config.yaml", "summary.json"
MAY_CHANGE_ON_RESUME = ("stop", "eval", "precision")


@dataclasses.dataclass
class RunFolder:
    """An open run folder, locked until the process ends, and the checkpoint to go on or to start from."""

    path: Path
    checkpoint: Checkpoint | None  # of this run
    start: Checkpoint | None  # of another, whose weights this one begins with
    finished_summary: dict[str, Any] | None  # of this very run, where there is nothing left to do
    lock: filelock.BaseFileLock
    fresh: bool  # empty until this process opened it
    precision_before: PrecisionConfig | None = None  # that the run had, where it goes on in another
    config_before: Path | None = None  # the file that this process's configuration took the place of

    def discard(self) -> None:
        """Leave no trace of a run that has not begun: the corrected command finds the folder as this one did."""
        if self.fresh:
            self.lock.release()
            shutil.rmtree(self.path, ignore_errors=True)
        elif self.config_before is not None:
            self.config_before.replace(self.path / CONFIG)


def open_run_folder(config: RunConfig) -> RunFolder:
    """Create or reopen the folder of a run, lock it and write its config.yaml. Raises UserError if it is not free."""
    source = None if config.resume in (None, "auto") else find_checkpoint(Path(str(config.resume)), "resume")
    start = None if config.init_from is None else find_checkpoint(Path(config.init_from), "init_from")
    if config.resume == "auto" and config.run_dir is None:
        path = _newest_of_same_hash(config) or _new_folder(config.name)
    elif config.run_dir is not None:
        path = Path(config.run_dir).absolute()
    elif source is not None:
        path = source.path.parent.parent
    else:
        path = _new_folder(config.name)

    occupied = path.exists() and any(p.name != ".lock" for p in path.iterdir()) if not path.is_file() else True
    goes_on = config.resume is not None
    if source is not None and source.path.parent.parent != path:
        raise UserError(
            f"resume={source.path} goes on with the run it belongs to, and run_dir={path} is another: leave out "
            "run_dir, or give init_from= in place of resume= for a new run from its weights"
        )
    if source is not None and checkpoint_paths(path)[-1:] != [source.path]:
        raise UserError(
            f"{source.path} is not the newest checkpoint of a run: give init_from= and run_dir= for a new run from it, "
            "so that the later ones are kept"
        )
    if occupied and not goes_on:
        raise UserError(
            f"the folder {path} is not empty: resume=auto goes on with the run in it, another run_dir= starts anew"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir={path} cannot be made ({error.strerror}): choose another run_dir=") from None
    lock = filelock.FileLock(path / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"the run folder {path} is in use by another process: wait for it or choose another run_dir="
        ) from None

    finished, precision_before = None, None
    if goes_on and (path / CONFIG).exists():
        before = _check_same_run(path, config)
        precision_before = before.precision if before.precision != config.precision else None
        finished = _finished_summary(path, config)
        paths = checkpoint_paths(path)
        source = open_checkpoint(paths[-1]) if paths else None
    elif goes_on and occupied:
        raise UserError(
            f"the folder {path} is not empty and holds no run ({CONFIG} is missing): choose another run_dir="
        )
    config_before = None if finished is not None else _write_config(path, config)
    return RunFolder(path, source, start, finished, lock, not occupied, precision_before, config_before)


def _new_folder(name: str) -> Path:
    now = datetime.datetime.now()
    parent = Path("outputs").absolute() / now.strftime("%Y-%m-%d")
    stem = f"{now.strftime('%H-%M-%S')}-{name}"
    for attempt in range(1, 1000):
        path = parent / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:  # making it claims it: jobs started in the same second get folders of their own
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise UserError(f"no free folder name for {parent / stem}: give run_dir=")


def _newest_of_same_hash(config: RunConfig) -> Path | None:
    for folder in sorted((p.parent for p in Path("outputs").absolute().glob(f"*/*/{CONFIG}")), reverse=True):
        try:
            if _read_config(folder).get("config_hash") == config.config_hash():
                return folder
        except UserError as error:
            sys.stderr.write(f"note: {error}; resume=auto looks further\n")
    return None


def find_checkpoint(path: Path, key: str) -> Checkpoint:
    """A checkpoint folder, or the newest of a run folder. `key` is the setting the path was given for."""
    path = path.absolute()
    if not path.exists():
        raise UserError(f"{key}={path}: there is no such folder; give a run folder or one of its checkpoints/step_N")
    if (path / STATE).exists() or path.parent.name == "checkpoints":
        return open_checkpoint(path)
    paths = checkpoint_paths(path)
    if not paths:
        raise UserError(
            f"{key}={path}: there is no checkpoint in it; give a run folder with checkpoints/step_N, or wait for one"
        )
    return open_checkpoint(paths[-1])


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load((path / CONFIG).read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path / CONFIG} cannot be read: put it back, or choose another run folder")
    return content


def load_run_config(path: Path) -> RunConfig:
    """The configuration of the run in `path`. Raises UserError if there is none."""
    from moe_train.compose import validated

    if not (path / CONFIG).is_file():
        raise UserError(f"{path} is no run folder: it has no {CONFIG}")
    content = _read_config(path)
    content.pop("config_hash", None)
    config: RunConfig = validated(RunConfig, content, str(path / CONFIG))
    return config


def _write_config(path: Path, config: RunConfig) -> Path | None:
    content = yaml.safe_dump({**to_dict(config), "config_hash": config.config_hash()}, sort_keys=False)
    return write_keeping(path / CONFIG, content)


def write_keeping(target: Path, content: str) -> Path | None:
    """Write a file of a run's folder; another that is there stays beside it, as config.1.yaml, and is returned."""
    beside = None
    if target.exists() and target.read_text() != content:
        kept = len(list(target.parent.glob(f"{target.stem}.*{target.suffix}"))) + 1
        beside = target.rename(target.with_name(f"{target.stem}.{kept}{target.suffix}"))
    temporary = target.with_name(f".{target.name}")
    temporary.write_text(content)
    temporary.replace(target)
    return beside


def _check_same_run(path: Path, config: RunConfig) -> RunConfig:
    """The configuration that the run had until now."""
    earlier = load_run_config(path)
    before, now = earlier.identity(), config.identity()
    for identity in (before, now):
        for key in MAY_CHANGE_ON_RESUME:
            del identity[key]
        identity.setdefault("parallel.dispatch_format", "compute")  # left out where it is that
    for key, old, new in differences(before, now):
        raise UserError(
            f"the run in {path} was started with {key}={json.dumps(old)}, not {json.dumps(new)}: "
            "give the settings it was started with, or another run_dir="
        )
    return earlier


def _finished_summary(path: Path, config: RunConfig) -> dict[str, Any] | None:
    """The summary of this run if it has already ended as asked, so that it is not made twice."""
    try:
        summary: dict[str, Any] = json.loads((path / SUMMARY).read_text())
    except (OSError, ValueError):
        return None
    known = isinstance(summary, dict) and "steps" in summary  # else damaged: it is made anew at the end
    same = known and summary.get("status") == "finished" and summary.get("config_hash") == config.config_hash()
    return summary if same else None
