"""A folder that is there whole or not at all: filled beside its place, flushed, then renamed into it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from moe_train.errors import UserError


def check_free(out: Path, key: str = "out") -> None:
    """Refuse a place where something is already, before the work is done. `key` is the setting it was given for."""
    if out.is_symlink():
        raise UserError(f"{key}={out} is a symbolic link: give the folder itself")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{key}={out} is not empty: choose another folder or empty it")
    if out.exists() and not out.is_dir():
        raise UserError(f"{key}={out} is a file: choose a folder")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` (new or empty), which takes its place at the end, and is removed by an error.

    What a kill leaves is a hidden `.writing-NAME-…` beside it.
    """
    check_free(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".writing-{out.name}-", dir=out.parent))
    except OSError as error:
        raise UserError(f"out={out} cannot be made ({error.strerror}): choose another folder") from None
    try:
        yield temporary
        readable = 0o777 & ~_umask()  # mkdtemp's folder and safetensors' files are for their owner alone
        for path in [*sorted(temporary.rglob("*"), reverse=True), temporary]:  # what a folder holds before the folder
            path.chmod(readable if path.is_dir() else readable & 0o666)
            flush(path)
        os.rename(temporary, out)
        flush(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def flush(path: Path) -> None:
    """Have what was written to a file, or the names in a folder, on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)  # it can be read only by setting it
    os.umask(mask)
    return mask
