"""Errors a user can cause, and the one place where they become one line and an exit status.

Everything that a user can put right is raised as `UserError`, with a text that says what, where and what to do.
`reported` is wrapped round every entry point; what it does not know is a bug of ours or damage nobody foresaw, said in
one line too, with the way to the traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Iterator


class UserError(Exception):
    """Something the user can put right: what is wrong, where, and the remedy, in one line. Exit status 1."""

    exit_status = 1
    of_one_process = False  # said whoever meets it: the first process of a machine does not


class UsageError(UserError):
    """The command line itself cannot be read. Exit status 2."""

    exit_status = 2


class EndedBySignal(KeyboardInterrupt):
    """A signal ends the command, which has said all that there is to say. The exit status is the shell's for it."""

    def __init__(self, number: int, said: str) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}{said}")
        self.number, self.exit_status = number, 128 + number


class BeforeFirstStep(EndedBySignal):
    """A signal ends a run that has made no step yet."""

    def __init__(self, number: int, saved_step: int | None = None) -> None:
        """saved_step: of an earlier attempt."""
        what = "nothing is saved, and the same command starts it again"
        if saved_step is not None:
            what = f"step_{saved_step} is as it was: go on with resume=auto"
        super().__init__(number, f" before its first step: {what}")


def one_line(text: object) -> str:
    return " ".join(str(text).split())


def describe_known_failure(error: BaseException) -> str | None:
    """One line for failures of the machine rather than of our code, or None if this is not one."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full{where}: free some space, then go on with resume=auto"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS):
        return f"no permission to write {error.filename}: choose another folder with run_dir= or data.cache_dir="
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}: put it right or choose another place"
    name = type(error).__name__
    if name == "OutOfMemoryError" or isinstance(error, MemoryError):
        return "out of memory: lower micro_batch_size or data.sequence_length, or choose a smaller model"
    if "gloo" in str(error) or "NCCL" in str(error):
        return "another process of the run is gone or does not answer: see what it said; go on with resume=auto"
    # torch and safetensors report a full disk, torch a failed CPU allocation too, as errors of their own.
    text = str(error)
    if any(sign in text for sign in ("os error 28", "os error 27", "No space left", "PytorchStreamWriter failed")):
        return "the disk is full: free some space, then repeat the command, a training run with resume=auto"
    if "DefaultCPUAllocator" in text:
        return "out of memory: lower micro_batch_size or data.sequence_length, or choose a smaller model"
    return None


def in_words(error: Exception) -> str:
    """What is said of it: a user error's own text, a known failure's, or that it is a bug."""
    unexpected = f"unexpected {type(error).__name__}: {one_line(error)} (debug=traceback shows where it arose)"
    return one_line(error) if isinstance(error, UserError) else describe_known_failure(error) or unexpected


def is_a_number(text: str) -> bool:
    """A whole one, as launchers write them: ² is a digit too."""
    return text.isascii() and text.isdigit()


def say(line: str, of_one_process: bool = False) -> None:
    """Once a machine, unless it is `of_one_process`: the other processes of a run there make the same mistake."""
    rank, number, processes = (os.environ.get(name, "") for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"))
    # What is left in the environment of a process that is alone, or wrong in it, makes nobody speak for another.
    in_a_group = is_a_number(processes) and is_a_number(number) and int(processes) > max(1, int(number))
    others_speak = in_a_group and (rank or number) != "0"
    if of_one_process or not others_speak:
        sys.stderr.write(line + "\n")


@contextlib.contextmanager
def reported(traceback: bool = False) -> Iterator[None]:
    """Turn user errors into one line on stderr and an exit status; with `traceback` they are raised unchanged."""
    try:
        yield
    except BrokenPipeError:  # the reader of our output is gone (| head): nothing left to say
        sys.stderr.close()
        os._exit(1)
    except EndedBySignal as end:
        say(str(end))
        sys.exit(end.exit_status)
    except KeyboardInterrupt:
        if traceback:
            raise
        remedy = "give the same command again, a training run with resume=auto"
        say(f"interrupted: {remedy} (work after the last checkpoint is repeated)")
        sys.exit(130)
    except Exception as error:
        if traceback:
            raise
        say(f"error: {in_words(error)}", isinstance(error, UserError) and error.of_one_process)
        sys.exit(error.exit_status if isinstance(error, UserError) else 1)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within `reported`, of a command that keeps nothing by itself: Ctrl-C and SIGTERM raise EndedBySignal once.

    What is being made meanwhile is taken away by whoever makes it. Another signal a while later ends the process at
    once. Signals that somebody ignores stay so.
    """
    came: list[float] = []

    def come(number: int, _frame: object) -> None:
        came.append(time.monotonic())
        if len(came) == 1:
            raise EndedBySignal(number, ": nothing is kept")
        if came[-1] - came[0] > _ONE_SIGNAL_SECONDS:
            os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, come)
    yield


_ONE_SIGNAL_SECONDS = 2.0  # `timeout` and terminals send it to a process and to its group
