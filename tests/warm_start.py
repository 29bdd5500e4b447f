"""The scripts as processes that need not import torch first: forks of one that has, and has done nothing else.

Half of a short command's time is that import. A fork runs the same file with the same arguments, folder and
environment, and ends with the same status and output. What is about starting itself (launchers, signals, clocks) starts
a Python of its own instead.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from moe_train.before_torch import settle_environment

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = "moe_train.training.run"


class Forks:
    """A process that forks one script at a time."""

    def __init__(self, environment: dict[str, str]) -> None:
        # Libraries read some of it while they are imported.
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, command: list[str], folder: Path, environment: dict[str, str], files: tuple[Path, Path]) -> int:
        """The status of `python command…`, which writes stdout and stderr to the files."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        asked = {"command": command, "folder": str(folder), "environment": environment, "files": list(map(str, files))}
        self.server.stdin.write(json.dumps(asked) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(60)


def _serve(requests: IO[str], answers: IO[str], seconds: int = 300) -> None:
    settle_environment()
    __import__(IMPORTED)
    for line in requests:
        child = os.fork()
        if not child:
            _become(json.loads(line))
        signal.signal(signal.SIGALRM, lambda *_, child=child: os.kill(child, signal.SIGKILL))
        signal.alarm(seconds)
        _, status = os.waitpid(child, 0)
        signal.alarm(0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _become(asked: dict[str, Any]) -> None:
    import runpy

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    outputs = [os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for file in asked["files"]]
    for source, target in zip((nothing, *outputs), range(3)):
        os.dup2(source, target)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, "w" if n else "r", closefd=False) for n in range(3))
    script = asked["command"][0]
    sys.argv, sys.path[0] = asked["command"], str(Path(script).parent)
    status = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as exit:
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
        status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve(sys.stdin, sys.stdout)
