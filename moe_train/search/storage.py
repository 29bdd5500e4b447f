"""The sqlite file of a search: opened, shared by several workers, and what is said when it cannot be used."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

import filelock
import optuna
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError

from moe_train.errors import UserError, one_line

LOCKED_SECONDS = 10.0  # a look into the file takes milliseconds


@contextlib.contextmanager
def said(path: Path) -> Iterator[None]:
    """Errors of the storage as one line with the remedy."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        text = one_line(f"{error} {error.__cause__ or ''}")
        why = text.partition(" [SQL")[0]
        if "locked" in text:
            raise UserError(f"{path} is locked by another process: let it end, then give the same command") from None
        if "disk is full" in text or "disk I/O" in text:
            raise UserError(f"{path} cannot be written ({why}): free some space, then give the same command") from None
        if "unable to open" in text or "readonly" in text:
            raise UserError(f"{path} cannot be opened: choose another folder with out=") from None
        raise UserError(
            f"{path} is no readable study ({why}): put it back, or move it away and give the "
            "same command (runs that are finished are not made again)"
        ) from None
    except RuntimeError as error:  # written by another Optuna
        if "Optuna" not in str(error) and "optuna" not in str(error):
            raise
        raise UserError(f"{path} was written by another version of Optuna ({one_line(error)}): give out=") from None


def open_storage(path: Path) -> optuna.storages.RDBStorage:
    """Makes the file where it is missing. Raises UserError."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={path.parent} cannot be made ({error.strerror}): choose another out=") from None
    with said(path), filelock.FileLock(path.parent / ".making.lock"):  # tables are made by one worker
        return optuna.storages.RDBStorage(
            f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": LOCKED_SECONDS}}
        )


class Worker:
    """This process among those that work on a search: while it lives it holds a file that the system lets go of."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "workers"
        self._folder.mkdir(parents=True, exist_ok=True)
        self.name = uuid.uuid4().hex
        self._lock = filelock.FileLock(self._file(self.name))
        self._lock.acquire()

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.lock"

    def is_dead(self, name: str | None) -> bool:
        """Whether a worker has gone and left its trials behind."""
        if name == self.name:
            return False
        if name is None or not self._file(name).exists():
            return True
        try:
            with filelock.FileLock(self._file(name), timeout=0):
                return True
        except filelock.Timeout:
            return False

    def leave(self) -> None:
        self._lock.release()
        self._file(self.name).unlink(missing_ok=True)
