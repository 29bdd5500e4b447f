"""`python -m moe_train.sweeps.forking`: has imported what a run imports, and forks a process for each run.

Asked in lines of JSON by sweeps/warm.py, which says what for. Nothing is done here but importing: no thread is started,
no random number drawn and no device touched, so that a fork finds what a Python of its own would have found. It ends
when nobody can ask any more; what it has forked goes on.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import pkgutil
import runpy
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from moe_train.before_torch import settle_environment
from moe_train.errors import one_line
from moe_train.kernels import __path__ as KERNELS
from moe_train.launch import TRAIN

READY = "ready"
_ALWAYS = ("hydra", "moe_train.cli", "moe_train.training.run", "wandb", "wandb.sdk.launch")  # which a wandb run loads


def import_all() -> None:
    """What a run needs, as far as it can be told. Raises RuntimeError where the device was opened meanwhile."""
    settle_environment()
    for name in _ALWAYS:
        importlib.import_module(name)
    import torch

    if torch.version.cuda is not None and Path("/dev/nvidiactl").exists() and importlib.util.find_spec("triton"):
        for name in ("pynvml", *(kernels.name for kernels in pkgutil.iter_modules(KERNELS, "moe_train.kernels."))):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    if _has_opened_a_gpu():
        raise RuntimeError("a module that was imported has opened the GPU, which a fork could not use")
    gc.freeze()  # what is there stays: it is not looked through, nor copied for it


def _has_opened_a_gpu() -> bool:
    for opened in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if os.readlink(opened).startswith("/dev/nvidia"):
                return True
    return False


def serve(requests: Any, answers: Any) -> None:
    for line in requests:
        asked = json.loads(line)
        said: int | None
        if "poll" in asked:
            pid, status = os.waitpid(asked["poll"], os.WNOHANG)
            said = None if pid == 0 else os.waitstatus_to_exitcode(status)
        else:
            begun, begins = os.pipe()
            said = os.fork()
            if said == 0:
                os.setsid()  # signals reach it from here on, and none comes from the end of another session
                os.close(begins)
                _become(asked, (begun, requests.fileno(), answers.fileno()))
            os.close(begins)
            os.read(begun, 1)
            os.close(begun)
        answers.write(f"{json.dumps(said)}\n")
        answers.flush()


def _become(asked: dict[str, Any], pipes: tuple[int, ...]) -> NoReturn:
    """`python train.py overrides…` with its environment and output."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        output = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        for pipe in pipes:
            os.close(pipe)
        # As a Python that writes to a file begins.
        encoding = None if sys.__stdout__ is None else sys.__stdout__.encoding
        sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", encoding=encoding, closefd=False)
        sys.stderr = os.fdopen(2, "w", 1, encoding, errors="backslashreplace", closefd=False)
        os.environ.clear()
        os.environ.update(asked["environment"])
        sys.argv, sys.path[0] = [str(TRAIN), *asked["overrides"]], str(TRAIN.parent)
        runpy.run_path(str(TRAIN), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks says when it is over
    while os.open(os.devnull, os.O_RDWR) < 3:  # the place of what a shell has closed
        pass
    asked_in, said_in = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a module prints while it is imported is no answer
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    try:
        import_all()
    except Exception as error:
        sys.stderr.write(f"note: {one_line(error)}\n")
        sys.stderr.flush()
        os._exit(1)
    try:
        said_in.write(f"{READY}\n")
        said_in.flush()
    except BrokenPipeError:  # who asked is gone
        os._exit(0)
    serve(asked_in, said_in)
    os._exit(0)  # torch and Triton take a second to be dismantled, and complain
