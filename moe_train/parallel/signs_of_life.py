"""A log for every process of a run, which also shows that it lives: `logs/process_N.log` in the run's folder.

Each touches its own once a second. When the others' network reports that a process is gone or does not answer, the logs
that no longer change say which; in them is what that process said last. A file system that all processes share is what
checkpoints need anyway.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import threading
import time
import traceback
from pathlib import Path

import torch.distributed as dist

from moe_train.errors import UserError, in_words

EVERY_SECONDS = 1.0
SILENT_SECONDS = 4.0  # without a sign, before a process counts as lost
_FAILED = "failed:"


class SignsOfLife:
    """Of this process, and of the others."""

    def __init__(self, run_folder: Path, rank: int) -> None:
        self.folder = run_folder / "logs"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.path_of(rank)
        self._log = self.path.open("a", buffering=1)
        self.rank = rank
        self.say(f"process {rank} on {socket.gethostname()}, pid {os.getpid()}")
        faulthandler.enable(self._log)  # a crash in native code leaves its stack there
        threading.Thread(target=self._beat, daemon=True).start()

    def path_of(self, rank: int) -> Path:
        return self.folder / f"process_{rank}.log"

    def _beat(self) -> None:
        while True:
            time.sleep(EVERY_SECONDS)
            try:
                os.utime(self.path)
            except OSError:  # the folder is gone: nothing to show it in
                return

    def say(self, text: str) -> None:
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def failed(self, error: BaseException) -> None:
        self.say(f"{_FAILED}\n" + "".join(traceback.format_exception(error)).rstrip())

    def discard(self) -> None:
        """Take this process's log away, and what is empty without it, as of a run that has not begun."""
        with contextlib.suppress(OSError):
            self.path.unlink()
            self.folder.rmdir()
            self.folder.parent.rmdir()

    def failed_alone(self) -> bool:
        """Whether the first process, which would speak for all, has not failed too. Takes a moment to be sure."""
        until = time.monotonic() + SILENT_SECONDS / 2
        while self.rank and time.monotonic() < until:
            try:
                attempt = self.path_of(0).read_text(errors="replace").rpartition(" process 0 on ")[2]
            except OSError:  # it has taken the run's folder away
                return False
            if _FAILED in attempt:
                return False
            time.sleep(0.05)
        return self.rank > 0

    def check_shared(self) -> None:
        """Once all processes have begun. Raises UserError where one does not see the first one's log."""
        if not self.path_of(0).exists():
            raise UserError(
                f"{socket.gethostname()} does not see the run folder of process 0, {self.folder.parent}: give a "
                "run_dir= on a file system that all nodes share, since each writes its part of a checkpoint there"
            )

    def silent(self, processes: int) -> list[int]:
        """The processes that give no sign any more. Takes a few seconds."""
        before = [self._last(rank) for rank in range(processes)]
        time.sleep(SILENT_SECONDS)
        return [rank for rank in range(processes) if self._last(rank) == before[rank]]

    def _last(self, rank: int) -> float | None:
        try:
            return self.path_of(rank).stat().st_mtime
        except OSError:
            return None


class LostProcesses(UserError):
    """Some processes of a run are gone or do not answer, so it has ended."""

    def __init__(self, signs: SignsOfLife, processes: int, saved_step: int | None) -> None:
        silent = signs.silent(processes)
        logs = " and ".join(str(signs.path_of(rank)) for rank in silent) or f"the logs in {signs.folder}"
        who = f"process {', '.join(map(str, silent))} of {processes} is" if silent else "some processes are"
        saved = "no step is saved" if saved_step is None else f"step_{saved_step} is saved"
        super().__init__(f"{who} gone or stuck: see {logs}; {saved}: go on with resume=auto")


class FailedAlone(UserError):
    """What kept one process from beginning, and the first not."""

    of_one_process = True

    def __init__(self, signs: SignsOfLife, error: Exception) -> None:
        super().__init__(f"process {signs.rank} could not begin: {in_words(error)}; more is in {signs.path}")


# What the libraries that carry collectives say; gloo does not always give its name.
_OF_A_NETWORK = ("gloo", "NCCL", "caused pair closure", "Connection closed by peer", "Connection reset by peer")


def is_of_the_network(error: BaseException) -> bool:
    """Whether an error says that other processes cannot be reached, rather than what went wrong here."""
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in _OF_A_NETWORK)
    return isinstance(error, dist.DistError) or said
