"""SIGTERM and Ctrl-C before a run's first step: one line says so, and nothing half made is left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from command_line import ROOT, Commands

# Put in the way of a run, in place of something that takes long: it waits, and the process that speaks for all tells.
WAITS = """
def waits(*_, **__):
    import os, pathlib, time
    if os.environ.get("RANK", "0") == "0":
        time.sleep(2 if "RANK" in os.environ else 0)  # a launcher that is still starting processes may lose a signal
        pathlib.Path("there").touch()
    time.sleep(SECONDS)
"""
IN_PLACE_OF = {
    "imports": "waits()",
    "data": "import moe_train.training.parts as parts; parts.prepare = waits",
    "data of the first": """
import os
import moe_train.training.parts as parts
if os.environ["RANK"] == "0":
    parts.prepare = waits
""",
    "model": "import moe_train.training.parts as parts; parts.build_optimizers = waits",
    "tracker": "import moe_train.training.loop as loop; loop.Run._write_formats = waits",
}
ALONE = [sys.executable]
TWO = ["torchrun", "--standalone", "--nproc-per-node", "2"]
NOTHING = "before its first step: nothing is saved, and the same command starts it again"


def started(
    commands: Commands, start: list[str], stage: str, *overrides: str, seconds: float = 60
) -> subprocess.Popen[str]:
    """train.py, come as far as the stage."""
    imports, main = "import hydra\n", 'if __name__ == "__main__":\n    settle_environment()\n'
    text = (ROOT / "train.py").read_text()
    assert text.count(imports) == text.count(main) == text.count("import traceback\n") == 1
    text = text.replace("import traceback\n", f"import traceback\nsys.path.insert(0, {str(ROOT)!r})\n")
    where = imports if stage == "imports" else main
    text = text.replace(where, f"{WAITS.replace('SECONDS', str(seconds))}\n{IN_PLACE_OF[stage]}\n{where}")
    script = commands.folder / "slow_train.py"
    script.write_text(text)
    process = commands.start([*start, str(script), *commands.tiny, "run_dir=run", *overrides])
    while not (commands.folder / "there").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return process


def said(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if "interrupted" in line]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stage", ["imports", "data", "model"])
def test_one_process_says_so_and_leaves_nothing(commands: Commands, stage: str, number: signal.Signals) -> None:
    process = started(commands, ALONE, stage)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert said(errors) == [f"interrupted by {number.name} {NOTHING}"]
    assert "Traceback" not in errors
    assert not (commands.folder / "run").exists()


@pytest.mark.parametrize("stage", ["imports", "data", "data of the first", "model"])
def test_two_processes_say_so_once_and_leave_nothing(commands: Commands, stage: str) -> None:
    process = started(commands, TWO, stage, "parallel=fsdp2")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert said(errors) == [f"interrupted by SIGTERM {NOTHING}"]
    assert "error:" not in errors
    assert not (commands.folder / "run").exists()


def test_one_that_waits_for_others_in_native_code_ends_too(commands: Commands) -> None:
    process = started(commands, TWO, "data of the first", "parallel=fsdp2")
    logs = commands.folder / "run/logs/process_1.log"
    while not logs.exists():
        time.sleep(0.01)
    time.sleep(1)  # the other has nothing to prepare and has come to where it waits
    os.kill(int(re.findall(r"pid (\d+)", logs.read_text())[0]), signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert said(errors) == [f"interrupted by SIGTERM {NOTHING}"]  # by the first, which the launcher then ended


def test_a_run_that_was_to_go_on_is_as_it_was(commands: Commands) -> None:
    commands.train("run_dir=run")
    before = {path: path.read_bytes() for path in sorted((commands.folder / "run").rglob("*")) if path.is_file()}
    process = started(commands, ALONE, "model", "resume=auto", "stop.steps=12")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert said(errors) == ["interrupted by SIGTERM before its first step: step_6 is as it was: go on with resume=auto"]
    changed = [path.name for path, content in before.items() if path.read_bytes() != content]
    assert changed == ["ledger.json"]  # what it took is on the bill
    attempts = json.loads((commands.folder / "run/ledger.json").read_text())["attempts"]
    assert [attempt["status"] for attempt in attempts] == ["finished", "interrupted"]


def test_once_there_is_something_to_go_on_with_it_is_saved(commands: Commands) -> None:
    process = started(commands, ALONE, "tracker", seconds=1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert said(errors) == ["error: interrupted by SIGTERM after step 0, which is saved: go on with resume=auto"]
    commands.train("run_dir=run", "resume=auto")
    assert commands.summary("run")["steps"] == 6
