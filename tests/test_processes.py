"""A process is known by its number and when it began, whatever is done to the clock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from moe_train import processes
from moe_train.processes import began, is_alive


def test_a_clock_that_is_set_makes_no_other_process_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = began(os.getpid())
    set_back = psutil.boot_time() - 3600.0
    monkeypatch.setattr(psutil, "boot_time", lambda: set_back)
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: set_back, raising=False)
    assert is_alive(os.getpid(), moment)


def test_another_of_its_number_is_not_it() -> None:
    assert not is_alive(os.getpid(), "another")
    assert not is_alive(os.getpid(), None)
    assert began(os.getpid()) != began(os.getppid())


@pytest.mark.parametrize("proc", [True, False])
def test_one_that_has_ended_is_gone_whether_or_not_its_parent_has_asked(
    proc: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not proc:
        monkeypatch.setattr(processes, "began", processes._by_the_clock)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    moment = processes.began(child.pid)
    assert is_alive(child.pid, moment)
    assert child.stdin is not None
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is a zombie
    assert not is_alive(child.pid, moment)
    child.wait()
    assert processes.began(child.pid) is None
    assert processes.began(2**22 + 1) is None


@pytest.mark.skipif(not Path("/proc/sys/kernel/random/boot_id").exists(), reason="this system does not tell its boots")
def test_a_number_of_before_a_reboot_is_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = began(os.getpid())
    monkeypatch.setattr(processes, "_boot", lambda: "later")
    assert not is_alive(os.getpid(), moment)
