"""Mistakes in starting several processes: one line from the first, and all end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from command_line import ROOT, Commands


def start(commands: Commands, *of_each: tuple[str, ...], port: int, **environment: str) -> list[str]:
    """As many processes as there are settings, without a launcher; what each said.

    `NAME_OF_1`: NAME in the environment of the second alone.
    """
    started, before = [], commands.environment
    for rank, overrides in enumerate(of_each):
        own = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": environment.get("WORLD_SIZE", str(len(of_each))),
        }
        own |= {"LOCAL_WORLD_SIZE": own["WORLD_SIZE"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        suffix = f"_OF_{rank}"
        own |= {name.removesuffix(suffix): each for name, each in environment.items() if name.endswith(suffix)}
        commands.environment = before | own
        started.append(commands.start([sys.executable, str(ROOT / "train.py"), *commands.tiny, *overrides]))
    said = []
    for process in started:
        try:
            said.append(process.communicate(timeout=90)[1])
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert process.returncode == 1, said
    return said


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error:")]


def test_processes_with_different_settings_are_refused(commands: Commands, port: int) -> None:
    first, second = start(commands, ("run_dir=run",), ("run_dir=run", "optimizer.lr=0.5"), port=port)
    (line,) = errors(first)
    assert "were started with different settings, optimizer.lr=0.5 and " in line
    assert line.endswith("give all the same command line")
    assert not errors(second)
    assert not (commands.folder / "run").exists()


def test_processes_with_other_code_are_refused(
    commands: Commands, port: int, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from moe_train.parallel.agreement import code_digest

    folder = tmp_path_factory.mktemp("code")
    (folder / "a.py").write_text("x = 1\n")
    before = code_digest(folder)
    assert code_digest(folder) == before
    (folder / "a.py").write_text("x = 2\n")
    assert code_digest(folder) != before


def test_a_single_process_of_torchrun_is_a_run_like_any_other(commands: Commands, port: int) -> None:
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    commands.train("run_dir=plain", "stop.steps=2")
    commands.environment |= alone | {"MASTER_PORT": str(port)}
    commands.train("run_dir=launched", "stop.steps=2")
    losses = [commands.summary(run)["final_train_loss"] for run in ("plain", "launched")]
    assert losses[0] == losses[1]


def test_a_port_in_use_is_named(commands: Commands) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = int(taken.getsockname()[1])
        (said,) = start(commands, ("run_dir=run", "parallel.timeout_seconds=5"), port=number, WORLD_SIZE="2")
    (line,) = errors(said)
    assert f"the port of 127.0.0.1:{number}, where processes are to meet, is in use" in line


def test_a_missing_process_is_waited_for_so_long_and_no_longer(commands: Commands, port: int) -> None:
    (said,) = start(commands, ("run_dir=run", "parallel.timeout_seconds=3"), port=port, WORLD_SIZE="2")
    (line,) = errors(said)
    assert f"2 processes did not come together at 127.0.0.1:{port} within 3 s" in line
    assert "start the missing ones" in line


def test_a_layout_that_cannot_be_held_ends_all_with_one_line(commands: Commands) -> None:
    command = ("torchrun", "--standalone", "--nproc-per-node", "2", str(ROOT / "train.py"), *commands.tiny)
    result = commands.run(*command, "parallel=ep", "model.moe.num_experts=7", "run_dir=run", check=False)
    assert result.returncode != 0
    (line,) = errors(result.stderr)
    assert "parallel.expert_parallel=2 does not divide model.moe.num_experts=7" in line
    assert os.listdir(commands.folder) == []


def test_a_batch_that_does_not_divide_has_two_remedies(commands: Commands, port: int) -> None:
    first, second = start(commands, ("batch_size=7",), ("batch_size=7",), port=port)
    (line,) = errors(first)
    assert line.endswith("among 2 processes: choose a multiple, or as many processes as divide it")
    assert not errors(second)


def test_layouts_of_accelerate_are_refused_with_our_name_for_them(commands: Commands) -> None:
    commands.environment["ACCELERATE_USE_FSDP"] = "true"
    result = commands.run(sys.executable, str(ROOT / "train.py"), *commands.tiny, "run_dir=run", check=False)
    assert result.returncode == 1
    (line,) = errors(result.stderr)
    assert "accelerate was set up for FSDP" in line
    assert "choose parallel= (fsdp2, ep, …) instead" in line


def test_what_keeps_one_process_from_beginning_is_said_by_it_and_kept_in_its_log(commands: Commands, port: int) -> None:
    (commands.folder / "a_file").touch()
    cache = str(commands.folder / "a_file")
    first, second = start(commands, ("run_dir=run",), ("run_dir=run",), port=port, MOE_TRAIN_CACHE_OF_1=cache)
    (line,) = errors(second)
    log = commands.folder / "run/logs/process_1.log"
    assert line.startswith("error: process 1 could not begin: ")
    assert cache in line
    assert line.endswith(f"; more is in {log}")
    assert "failed:" in log.read_text()
    (line,) = errors(first)
    assert f"process 1 of 2 is gone or stuck: see {log}; no step is saved" in line


def test_processes_that_read_other_text_are_refused(
    commands: Commands, port: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As on a node whose disk has other files under the same names."""
    texts = tmp_path_factory.mktemp("texts")
    for home, word in (("a", "one"), ("b", "two")):
        (texts / home).mkdir()
        (texts / home / "text.jsonl").write_text("".join(f'{{"text": "{word} {"more " * n}"}}\n' for n in range(60)))
    settings = ("run_dir=run", 'data.files=["~/*.jsonl"]', "data.val_fraction=0.3")
    homes = {"HOME_OF_0": str(texts / "a"), "HOME_OF_1": str(texts / "b")}
    first, second = start(commands, settings, settings, port=port, **homes)
    (line,) = errors(first)
    assert "process 1 (" in line
    assert "have other text or another tokenizer (fingerprints " in line
    assert line.endswith("give all nodes the same files")
    assert not errors(second)
    assert not (commands.folder / "run").exists()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "5"}, "RANK=5: it has to be this process's number, below WORLD_SIZE=2"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR=: it has to be the host of process 0"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT=abc: it has to be a free port of it"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_place_to_meet_that_is_none_is_named(commands: Commands, environment: dict[str, str], said: str) -> None:
    whole = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    commands.environment |= whole | environment
    refused = commands.run(sys.executable, str(ROOT / "train.py"), *commands.tiny, "run_dir=run", check=False)
    (line,) = errors(refused.stderr)
    assert f"error: the environment has {said}" in line


@pytest.mark.parametrize("seconds", ["0.001", "1e7", "1e300"])
def test_a_timeout_that_no_network_keeps_is_refused(commands: Commands, seconds: str) -> None:
    refused = commands.train("run_dir=run", f"parallel.timeout_seconds={seconds}", check=False)
    (line,) = errors(refused.stderr)
    assert line.startswith("error: configuration: parallel.timeout_seconds=")
    assert "input should be " in line
