"""A command in a terminal of its own, and what a person sees there: the screen after all the redrawing."""

from __future__ import annotations

import os
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from fcntl import ioctl
from pathlib import Path

import pyte


class Terminal:
    """Runs `command` on a pseudo-terminal that controls it; `stdout` may go to a file instead."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        columns: int = 100,
        lines: int = 40,
        stdout: int | None = None,
    ) -> None:
        self._master, slave = os.openpty()
        ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self._modes = termios.tcgetattr(slave)
        self._slave = slave  # kept open, so that what was written can be read after the process has ended
        os.set_blocking(self._master, False)
        self.screen = pyte.HistoryScreen(columns, lines, history=1000)
        self._stream = pyte.ByteStream(self.screen)

        def take_terminal() -> None:
            os.login_tty(slave)
            if stdout is not None:
                os.dup2(stdout, 1)

        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env={"TERM": "xterm-256color", **{k: v for k, v in environment.items() if k not in ("COLUMNS", "LINES")}},
            preexec_fn=take_terminal,
            pass_fds=() if stdout is None else (stdout,),
        )

    def text(self) -> str:
        """What has scrolled off, and what the screen shows."""
        self._read()
        above = [
            "".join(line[column].data for column in range(self.screen.columns)) for line in self.screen.history.top
        ]
        return "\n".join(line.rstrip() for line in [*above, *self.screen.display])

    def shows(self, wanted: Callable[[str], bool], seconds: float = 60) -> str:
        """Wait until the text is as wanted, and return it."""
        deadline = time.monotonic() + seconds
        while not wanted(text := self.text()):
            assert time.monotonic() < deadline, text
            assert self.process.poll() is None or wanted(self.text()), text
            time.sleep(0.02)
        return text

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def wait(self, seconds: float = 60) -> int:
        """The exit status. What is written until then is read, or the process would wait for a reader."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            self._read()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)
        return self.process.returncode

    def is_in_order(self) -> bool:
        """Its modes are those it had, the cursor is there and at the beginning of a line."""
        self._read()
        unchanged = termios.tcgetattr(self._slave) == self._modes
        return unchanged and not self.screen.cursor.hidden and self.screen.cursor.x == 0

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self._slave)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 65536)
            except (BlockingIOError, OSError):
                return
            if not data:
                return
            self._stream.feed(data)
