"""What becomes of a run when a process of it is told to end, dies or hangs: nothing is lost, and nobody waits for ever.

Real processes, started by torchrun.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from command_line import ROOT, Commands

LONG = ["stop.steps=100000", "checkpoint.every_steps=5", "data.tokenizer=bytes", "parallel.timeout_seconds=12"]


@pytest.fixture
def started(commands: Commands) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a run of several processes, and ends what the test leaves of it."""
    processes: list[subprocess.Popen[str]] = []

    def start(number: int, *overrides: str, starter: str = "torchrun") -> subprocess.Popen[str]:
        command = ["torchrun", "--standalone", "--nproc-per-node", str(number)]
        if starter == "accelerate":
            commands.environment["ACCELERATE_USE_CPU"] = "1"
            command = ["accelerate", "launch", "--quiet", "--multi_gpu", "--num_processes", str(number)]
            command += ["--main_process_port", "0"]
        processes.append(commands.start([*command, str(ROOT / "train.py"), *commands.tiny, *overrides]))
        return processes[-1]

    yield start
    for process in processes:
        for each in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            each.kill()
        process.communicate()


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    metrics = folder / "metrics.jsonl"
    for _ in range(6000):
        if metrics.exists() and len(metrics.read_text().splitlines()) >= step:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    raise AssertionError(f"no step {step} within a minute")


def pid_of(folder: Path, rank: int) -> int:
    (pid,) = re.findall(r"pid (\d+)", (folder / f"logs/process_{rank}.log").read_text())
    return int(pid)


def running(folder: Path, processes: int) -> list[int]:
    pids = [pid_of(folder, rank) for rank in range(processes)]
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def test_sigterm_saves_the_step_and_the_run_goes_on_with_other_processes(
    commands: Commands, started: Callable[..., subprocess.Popen[str]]
) -> None:
    process = started(2, *LONG, "parallel=fsdp2", "run_dir=run")
    run = commands.folder / "run"
    wait_for_step(run, 3, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert "interrupted by SIGTERM after step" in errors
    assert running(run, 2) == []
    (step,) = (int(p.name.removeprefix("step_")) for p in (run / "checkpoints").glob("step_*"))
    assert commands.summary("run")["status"] == "interrupted"
    before = commands.metrics("run")
    assert len(before) == step
    assert not list((run / "checkpoints").glob(".writing-*"))

    commands.train(
        "run_dir=run", "resume=auto", "parallel=single", "checkpoint.every_steps=5", f"stop.steps={step + 2}"
    )
    rows, ledger = commands.metrics("run"), json.loads((run / "ledger.json").read_text())
    assert [row["step"] for row in rows] == list(range(1, step + 3))
    assert rows[step]["progress/tokens"] > rows[step - 1]["progress/tokens"]
    assert rows[step]["cost/usd_total"] > rows[step - 1]["cost/usd_total"]
    assert [attempt["num_devices"] for attempt in ledger["attempts"]] == [2, 1]


@pytest.mark.parametrize("deadly", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_dies_or_hangs_ends_the_run_and_its_log_is_named(
    commands: Commands, started: Callable[..., subprocess.Popen[str]], deadly: signal.Signals
) -> None:
    process = started(2, *LONG, "parallel=ep", "run_dir=run")
    run = commands.folder / "run"
    wait_for_step(run, 6, process)
    while not list((run / "checkpoints").glob("step_*")):  # written while training goes on
        assert process.poll() is None
        time.sleep(0.01)
    lost = pid_of(run, 1)
    os.kill(lost, deadly)
    if deadly == signal.SIGSTOP:
        while "Traceback" not in (run / "logs/process_0.log").read_text():  # the other has waited long enough
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(lost, signal.SIGKILL)  # as torchrun does, 30 seconds later
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    (line,) = (line for line in errors.splitlines() if line.startswith("error:"))
    assert f"process 1 of 2 is gone or stuck: see {run}/logs/process_1.log; step_" in line
    assert line.endswith("go on with resume=auto")
    assert running(run, 2) == []

    saved = int(re.findall(r"step_(\d+) is saved", line)[0])
    again = commands.run(
        *("torchrun", "--standalone", "--nproc-per-node", "2", str(ROOT / "train.py"), *commands.tiny, *LONG),
        *("parallel=ep", "run_dir=run", "resume=auto", f"stop.steps={saved + 2}"),
    )
    assert f"going on from step {saved}" in again.stderr
    assert commands.summary("run")["steps"] == saved + 2


@pytest.mark.parametrize("starter", ["torchrun", "accelerate"])
def test_processes_whose_launcher_is_killed_save_their_step_and_end(
    commands: Commands, started: Callable[..., subprocess.Popen[str]], starter: str
) -> None:
    process = started(2, *LONG, "parallel=ep", "run_dir=run", starter=starter)
    run = commands.folder / "run"
    wait_for_step(run, 3, process)
    process.kill()
    _, errors = process.communicate(timeout=60)  # until nobody can write there any more
    assert f"note: the launcher (process {process.pid}) is gone: this run ends with a checkpoint" in errors
    assert errors.count("note: the launcher") == 1
    assert "interrupted by SIGTERM after step" in errors
    assert running(run, 2) == []
    assert commands.summary("run")["status"] == "interrupted"
    assert (run / f"checkpoints/step_{commands.summary('run')['steps']}").is_dir()
    for rank in range(2):
        assert (run / f"logs/process_{rank}.log").read_text().count(
            f"the launcher (process {process.pid}) is gone"
        ) == 1
