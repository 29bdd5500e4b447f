"""Mistakes of the user at the real command line: one line, the right exit status, nothing written over."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from command_line import ROOT, Commands


def one_line(commands: Commands, *command: str, status: int = 1) -> str:
    result = commands.run(*command, check=False)
    errors = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert result.returncode == status, result.stderr
    assert len(errors) == 1, result.stderr
    assert errors[0].startswith("error: ")
    return errors[0]


@pytest.mark.parametrize(
    ("override", "says", "status"),
    [
        ("model.moe.nexperts=8", "unknown key model.moe.nexperts: did you mean model.moe.num_experts?", 1),
        ("model=null", "takes the name of one of its files", 1),
        ("model=nano,tiny", "model=nano,tiny has several values", 1),
        ("model.mtp.depth=1", "unknown key model.mtp.depth with these choices: it comes with another file", 1),
        ("schedule.segments=[]", "schedule.segments with these choices: it comes with another file", 1),
        ("schedule=deepseek_v3 schedule.segments=3", "configuration: schedule.segments=3: ", 1),
        (
            "precision.health.action=stop",
            "precision.health.action with these choices: it comes with another file of",
            1,
        ),
        ("init_from=", "init_from is empty", 1),
        ("model.dense_twin_of_moe=equal_params model.moe.num_experts=900000", "wider than a million", 1),
        ("name=../evil", "leave out the /", 1),
        ("optimizer.betas=[0.9]", "optimizer.betas", 1),
        ("num_threads=100000", "num_threads=100000 is more than the", 1),
        ("optimizer.lr=abc", 'optimizer.lr="abc"', 1),
        ("model=giant", "there is no model=giant: choose one of", 1),
        ("modell=nano", "unknown key modell", 1),
        ("claim=fp8_recipe", "claim= is no setting of a run: python scripts/reproduce.py", 1),
        ("experiment=missing", "there is no experiment=missing", 1),
        ("model.moe.top_k", "cannot read the command line", 2),
        ("model.moe=[", "cannot read the command line", 2),
        ("batch_size=6 micro_batch_size=4", "micro_batch_size=4 does not divide", 1),
        ("data.files=[missing/*.txt]", "missing/*.txt", 1),
        ("data.sequence_length=10000000", "data.sequence_length=10000000 is more than the training text holds", 1),
        ("data.files=[empty.txt]", "has no text", 1),
        ("data=hub_nothing", "there is no data=hub_nothing", 1),
        ("resume=nowhere", "resume=", 1),
        ("run_dir=taken", "is not empty", 1),
        ("tracking.wandb=online", "API key", 1),
        ("stop.usd=1 hardware.price_usd_per_hour=0", "stop.usd", 1),
        ("model.vocab_size=64", "model.vocab_size=64 is less than the tokenizer's", 1),
    ],
)
def test_a_mistake_ends_in_one_line(override: str, says: str, status: int, commands: Commands) -> None:
    (commands.folder / "empty.txt").write_text("")
    (commands.folder / "taken").mkdir()
    (commands.folder / "taken/thesis.txt").write_text("mine")
    assert says in one_line(commands, *commands.train_command(*override.split(" ")), status=status)
    assert sorted(p.name for p in (commands.folder / "taken").iterdir() if p.name != ".lock") == ["thesis.txt"]


def test_a_run_that_could_not_begin_leaves_its_folder_free(commands: Commands) -> None:
    one_line(commands, *commands.train_command("run_dir=run", "data.sequence_length=10000000"))
    assert not (commands.folder / "run").exists()


def test_an_unreachable_hub_is_said_with_the_offline_alternatives(commands: Commands) -> None:
    line = one_line(commands, sys.executable, str(ROOT / "train.py"), "data=tinystories", "tracking=none")
    assert "data=local_python" in line


def test_a_tokenizer_of_an_unreachable_hub_is_one_line_and_not_waited_for(commands: Commands) -> None:
    commands.environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    began = time.monotonic()
    line = one_line(commands, *commands.train_command("data.tokenizer=org/name"))
    assert "the hub cannot be reached: check the name and the network, or give data.tokenizer=bpe" in line
    assert time.monotonic() - began < 30  # its own client would wait 23 s for the first file alone


@pytest.mark.parametrize(("content", "reason"), [(b"\xff\xfe\x00\x01", "no UTF-8 text"), (b"a: [", "no YAML")])
def test_an_architectures_file_that_is_no_text_is_named(content: bytes, reason: str, commands: Commands) -> None:
    (commands.folder / "mine/model").mkdir(parents=True)
    (commands.folder / "mine/model/bin.yaml").write_bytes(content)
    for script in ("train.py", "scripts/describe.py"):
        line = one_line(commands, sys.executable, str(ROOT / script), "--config-dir", "mine", "model=bin")
        assert "mine/model/bin.yaml cannot be read" in line
        assert reason in line


def test_a_diverging_run_stops_before_it_saves_what_is_not_finite(commands: Commands) -> None:
    settings = [
        "run_dir=run",
        "model.initializer_range=1e20",
        "checkpoint.every_steps=1",
        "tracking.log_every_steps=10",
    ]
    line = one_line(commands, *commands.train_command(*settings, "stop.steps=20"))
    assert "lower optimizer.lr" in line
    assert "there is no checkpoint yet" in line
    assert not (commands.folder / "run/checkpoints").exists()


def test_an_empty_grid_is_refused(commands: Commands) -> None:
    assert "the grid is empty" in one_line(
        commands, sys.executable, str(ROOT / "train.py"), "-m", "seed=range(0)", status=2
    )


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("budget.usd=1,2", "a grid has one budget, which all jobs share: give budget.usd one value"),
        ("++cost.sweep=a,b", "a grid is one sweep: give cost.sweep one value"),
        ("hydra.launcher.job=2", "unknown key hydra.launcher.job: did you mean hydra.launcher.jobs?"),
        ("hydra/launcher=local", "there is no hydra/launcher=local: choose one of accelerate, basic"),
    ],
)
def test_what_a_grid_cannot_be_is_refused_before_a_run(override: str, says: str, commands: Commands) -> None:
    assert says in one_line(commands, sys.executable, str(ROOT / "train.py"), "-m", "seed=0,1", override)


@pytest.mark.parametrize("content", ["[]", '{"step": 6, "files": {}}', "\x00"])
def test_damage_nobody_foresaw_is_one_line_as_well(content: str, commands: Commands) -> None:
    commands.train("run_dir=run")
    (commands.folder / "run/checkpoints/step_6/state.json").write_text(content)
    (commands.folder / "run/summary.json").write_text("[]")
    one_line(commands, *commands.train_command("run_dir=run", "resume=auto", "stop.steps=8"))
    one_line(commands, sys.executable, str(ROOT / "scripts/generate.py"), "run=run")


def test_debug_shows_the_traceback(commands: Commands) -> None:
    result = commands.train("debug=traceback", "data.sequence_length=10000000", check=False)
    assert result.returncode == 1
    assert "Traceback" in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the always-full device of Linux")
def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(commands: Commands) -> None:
    commands.train("run_dir=run", "stop.steps=2")
    # A file-size limit of the process stands in for a disk that fills up while a checkpoint is written.
    limit = (commands.folder / "run/checkpoints/step_2/model.safetensors").stat().st_size // 1024 - 8
    script = f'trap "" XFSZ; ulimit -f {limit}; exec "$@"'
    command = commands.train_command("run_dir=run", "stop.steps=4", "resume=auto")
    result = commands.run("bash", "-c", script, "bash", *command, check=False)
    assert result.returncode == 1, result.stderr
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.stderr
    assert [p.name for p in (commands.folder / "run/checkpoints").iterdir()] == ["step_2"]
    commands.train("run_dir=run", "stop.steps=4", "resume=auto")


def test_scripts_name_a_wrong_argument_and_a_missing_run(commands: Commands) -> None:
    script = [sys.executable, str(ROOT / "scripts/generate.py")]
    assert "did you mean run=?" in one_line(commands, *script, "rum=x", status=2)
    assert "run= is missing" in one_line(commands, *script, "prompt=x", status=2)
    for argument, remedy in (
        ("max_new_tokens=many", "give a whole number"),
        ("max_new_tokens=0", "give a number above 0"),
        ("temperature=-1", "give a number of at least 0"),
        ("speculative=perhaps", "choose true or false"),
    ):
        assert f"{argument}: {remedy}" in one_line(commands, *script, "run=x", argument, status=2)
    assert "there is no such folder" in one_line(commands, *script, "run=x")
    assert "exists already" in one_line(commands, *script, "run=x", f"json={__file__}")
