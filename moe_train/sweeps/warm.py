"""Jobs that do not each import torch anew: forks of one process that has imported all that a run does.

A small run on an H200 trains for 2 s, and Python reads modules for 5 before it (2 s on two cores). The process is
started with the first job and ends with the pool; a job is a process of its own as ever, with its environment, output,
process group and clocks, which begin with the fork. Where there is no fork to be had, jobs start one by one.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Any

from moe_train.launch import TRAIN, job_environment, start_job
from moe_train.processes import began, is_alive
from moe_train.sweeps.forking import READY

_IMPORTS_WITHIN, _ANSWERS_WITHIN = 300.0, 10.0  # seconds; as a rule 5 and 0.001


class _Forked:
    """What a pool asks of a job."""

    def __init__(self, server: _Server, pid: int) -> None:
        self.pid = pid
        self._server = server
        self._began = began(pid)
        self._status: int | None = None

    def poll(self) -> int | None:
        if self._status is None:
            self._status = self._server.status(self.pid, self._began)
        return self._status


class _Server:
    """The process that forks."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "moe_train.sweeps.forking"]
        environment = job_environment()
        # Found as train.py finds it, installed or not, and nothing in the folder that one happens to be in.
        path = [str(TRAIN.parent), *filter(None, [environment.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            command,
            env=environment | {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.is_ready = self._answer(_IMPORTS_WITHIN) == READY

    def fork(self, overrides: Sequence[str], output: IO[str], environment: Mapping[str, str]) -> _Forked:
        asked = {"overrides": list(overrides), "environment": {**job_environment(), **environment}}
        return _Forked(self, self._ask(asked | {"output": output.name}))

    def status(self, pid: int, moment: str | None) -> int | None:
        """Of a job that has ended. One whose parent is gone leaves none: what it wrote says whether it finished."""
        try:
            found: int | None = self._ask({"poll": pid})
        except (OSError, ValueError):
            return None if is_alive(pid, moment) else 1
        return found

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # nobody reads what was asked last
                pipe.close()
        try:
            self._process.wait(_ANSWERS_WITHIN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, asked: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return json.loads(self._answer(_ANSWERS_WITHIN))

    def _answer(self, seconds: float) -> str:
        """A line; none where it is gone. One that does not answer in time, as it was stopped, is ended."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            self._process.kill()
        return self._process.stdout.readline().strip()


class WarmStarts:
    """Starts jobs of one process, as launch.py's `start_job` does. Within a `with`, at whose end the server ends."""

    def __init__(self) -> None:
        self._server: _Server | None = None
        self._forks = sys.platform == "linux"  # elsewhere a fork may find libraries in pieces

    def __call__(self, overrides: Sequence[str], output: IO[str], environment: Mapping[str, str]) -> Any:
        if self._forks and self._server is None:
            self._server = _Server()
            if not self._server.is_ready:
                self._forks = False
                sys.stderr.write("note: jobs start one by one, as the process that was to fork them did not begin\n")
        if self._forks and self._server is not None:
            try:
                return self._server.fork(overrides, output, environment)
            except (OSError, ValueError):
                self._forks = False
                sys.stderr.write("note: the process that forks jobs is gone: from now on they start one by one\n")
        return start_job(overrides, output, environment)

    def __enter__(self) -> WarmStarts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
