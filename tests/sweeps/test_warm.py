"""Jobs that are forked from a process that has imported torch are what jobs with a Python of their own are."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_line import TINY

from moe_train.launch import TRAIN, start_job
from moe_train.processes import began
from moe_train.sweeps import warm
from moe_train.sweeps.warm import WarmStarts

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every job starts a Python")

LONG = ["stop.steps=100000", "model.num_hidden_layers=2", "eval.max_tokens=2000", "tracking=none"]


@pytest.fixture(scope="module")
def starts() -> Iterator[WarmStarts]:
    with WarmStarts() as found:
        yield found


def ended(job: Any, seconds: float = 60) -> int:
    deadline = time.monotonic() + seconds
    while (status := job.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert job.poll() == status
    return int(status)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def both(starts: WarmStarts, tmp_path: Path, overrides: list[str], **environment: str) -> list[tuple[int, str]]:
    """Status and output, forked and not."""
    found = []
    for name, start in (("warm", starts), ("cold", start_job)):
        log = tmp_path / f"{name}.log"
        with log.open("a") as output:
            found.append((ended(start(overrides, output, environment)), log.read_text()))
    return found


@pytest.mark.parametrize(
    ("overrides", "status", "says"),
    [(["--cfg", "job"], 0, "hidden_size"), (["nonsense=1"], 1, "nonsense"), (["model=nothing"], 1, "nothing")],
)
def test_a_fork_ends_and_says_what_a_python_of_its_own_does(
    starts: WarmStarts, tmp_path: Path, overrides: list[str], status: int, says: str
) -> None:
    forked, own = both(starts, tmp_path, overrides)
    assert forked == own
    assert forked[0] == status
    assert says in forked[1]


def test_a_fork_has_its_own_environment(starts: WarmStarts, text_corpus: Path, tmp_path: Path) -> None:
    for cache in (tmp_path / "one", tmp_path / "other"):
        settings = [*TINY, f"data.files=[{text_corpus}/*.jsonl]", "stop.steps=1", f"run_dir={cache}-run"]
        with (tmp_path / "log").open("a") as output:
            job = starts(settings, output, {"MOE_TRAIN_CACHE": str(cache)})
        assert ended(job) == 0, (tmp_path / "log").read_text()
        assert list(cache.iterdir())


def test_a_fork_is_a_process_group_that_signals_reach(starts: WarmStarts, tmp_path: Path) -> None:
    with (tmp_path / "log").open("a") as output:
        job = starts([*LONG, f"run_dir={tmp_path / 'run'}"], output, {})
    assert os.getpgid(job.pid) == job.pid
    assert os.getpid() in [above.pid for above in psutil.Process(job.pid).parents()]
    wait_for(tmp_path / "run" / "metrics.jsonl")
    assert job.poll() is None
    os.killpg(job.pid, signal.SIGTERM)
    assert ended(job) == 128 + signal.SIGTERM
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    with (tmp_path / "log").open("a") as output:
        job = starts([*LONG, f"run_dir={tmp_path / 'other'}"], output, {})
    os.killpg(job.pid, signal.SIGKILL)
    assert ended(job) == -signal.SIGKILL


def test_a_fork_outlives_who_asked_for_it_and_its_clock_is_its_own(tmp_path: Path) -> None:
    with WarmStarts() as starts, (tmp_path / "log").open("a") as output:
        job = starts([*LONG, f"run_dir={tmp_path / 'run'}"], output, {})
        moment, forker = began(job.pid), psutil.Process(job.pid).ppid()
        assert moment is not None
        assert moment != began(forker)
    process = psutil.Process(job.pid)
    wait_for(tmp_path / "run" / "metrics.jsonl")
    assert began(job.pid) == moment
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(psutil.Error):
        process.wait(60)
    assert (tmp_path / "run" / "summary.json").exists()


def test_where_the_server_is_gone_its_jobs_are_followed_and_others_start_by_themselves(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with WarmStarts() as starts, (tmp_path / "log").open("a") as output:
        job = starts([*LONG, f"run_dir={tmp_path / 'run'}"], output, {})
        psutil.Process(job.pid).parent().kill()  # type: ignore[union-attr]
        wait_for(tmp_path / "run" / "metrics.jsonl")
        assert job.poll() is None
        other = starts(["--cfg", "job"], output, {})
        assert ended(other) == 0
        os.kill(job.pid, signal.SIGKILL)
        assert ended(job) == 1
    assert "they start one by one" in capfd.readouterr().err


def test_where_there_is_no_server_jobs_start_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(warm, "TRAIN", tmp_path / TRAIN.name)
    (tmp_path / "torch.py").write_text("raise ImportError('broken')")
    with WarmStarts() as starts, (tmp_path / "log").open("a") as output:
        for _ in range(2):
            assert ended(starts(["--cfg", "job"], output, {})) == 0
    said = capfd.readouterr().err
    assert said.splitlines()[0] == "note: broken"
    assert said.count("note: jobs start one by one") == 1
    assert "Traceback" not in said


def test_a_server_that_was_stopped_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(warm, "_ANSWERS_WITHIN", 0.5)
    with WarmStarts() as starts, (tmp_path / "log").open("a") as output:
        job = starts([*LONG, f"run_dir={tmp_path / 'run'}"], output, {})
        server = psutil.Process(job.pid).parent()
        assert server is not None
        server.suspend()
        assert job.poll() is None
        assert ended(starts(["--cfg", "job"], output, {})) == 0
        assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE
        os.killpg(job.pid, signal.SIGKILL)
        assert ended(job) == 1
    assert "they start one by one" in capfd.readouterr().err


def test_a_process_that_has_another_ones_number_is_not_waited_for(starts: WarmStarts) -> None:
    forked = warm._Forked(starts._server, os.getpid())  # type: ignore[arg-type]
    assert forked._began == began(os.getpid())
    lost = warm._Server.__new__(warm._Server)
    lost._ask = lambda asked: (_ for _ in ()).throw(BrokenPipeError)  # type: ignore[method-assign]
    assert lost.status(os.getpid(), forked._began) is None
    assert lost.status(os.getpid(), "another") == 1
    assert lost.status(2**22 + 1, None) == 1


DRIVER = """
import pathlib, sys, time
from moe_train.sweeps.warm import WarmStarts
folder = pathlib.Path(sys.argv[1])
with WarmStarts() as starts, (folder / "log").open("a") as output:
    job = starts(["--cfg", "job"], output, {})
    while (status := job.poll()) is None:
        time.sleep(0.02)
    (folder / "status").write_text(f"{status} {starts._forks}")
"""


@pytest.mark.parametrize("closed", ["", "<&-", "2>&-", "<&- >&- 2>&-"])
def test_a_shell_that_closed_streams_and_a_folder_of_modules_change_nothing(closed: str, tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(DRIVER)
    here = tmp_path / "here"
    here.mkdir()
    for name in ("torch", "json", "yaml", "textwrap", "moe_train"):
        (here / f"{name}.py").write_text("raise ImportError('of the folder that one happens to be in')")
    command = f"exec {sys.executable} {tmp_path / 'driver.py'} {tmp_path} {closed}"
    environment = os.environ | {"PYTHONPATH": str(TRAIN.parent)}
    assert subprocess.run(["sh", "-c", command], cwd=here, env=environment, check=False).returncode == 0
    assert (tmp_path / "status").read_text() == "0 True"
    assert "hidden_size" in (tmp_path / "log").read_text()
