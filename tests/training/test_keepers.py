"""Whose end is a run's: the launcher of several processes, and of nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from moe_train.processes import began
from moe_train.training import keepers

ASK = "from moe_train.training.keepers import launcher; print(launcher())"


def launcher_of(command: list[str], **environment: str) -> str:
    """What a process that this one starts takes for its launcher."""
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def this_process() -> str:
    return keepers.held_by_this_process()[keepers.HELD_BY]


@pytest.mark.parametrize("command", [[sys.executable, "-c", ASK], ["sh", "-c", f"{sys.executable} -c '{ASK}'; true"]])
def test_the_launcher_is_who_set_the_launch_and_no_script_in_between(command: list[str]) -> None:
    assert launcher_of(command, TORCHELASTIC_RUN_ID="of this test", WORLD_SIZE="2") == this_process()


def test_a_single_process_and_one_that_was_started_by_hand_outlive_their_parent() -> None:
    command = [sys.executable, "-c", ASK]
    assert launcher_of(command, TORCHELASTIC_RUN_ID="of this test", WORLD_SIZE="1") == "None"
    assert launcher_of(command, WORLD_SIZE="2") == "None"


def test_once_it_is_gone_the_process_is_told_to_end_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    told, said = threading.Event(), []
    monkeypatch.setattr(keepers, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(os, "kill", lambda pid, number: told.set())
    keeper = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    identity = f"{keeper.pid},{began(keeper.pid)}"
    keepers.end_with_launcher(identity, said.append)
    assert not told.wait(0.1)
    assert keeper.stdin is not None
    keeper.stdin.close()
    assert told.wait(30)  # before its parent has asked for its status
    keeper.wait()
    assert said == [f"the launcher (process {keeper.pid}) is gone: this run ends with a checkpoint"]
