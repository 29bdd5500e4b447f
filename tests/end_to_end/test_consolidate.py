"""Shards that several processes left become two files, with which everything goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from command_line import ROOT, Commands
from safetensors.torch import load_file

from moe_train.training import consolidate as module
from moe_train.training.checkpoints import read_weights
from moe_train.training.run_folder import find_checkpoint

CONSOLIDATE = [sys.executable, str(ROOT / "scripts/consolidate.py")]


def spread(commands: Commands) -> Path:
    """A finished run of two processes with shards, and its checkpoint."""
    command = ("torchrun", "--standalone", "--nproc-per-node", "2", str(ROOT / "train.py"), *commands.tiny)
    commands.run(*command, "parallel=ep_fsdp2", "run_dir=run", "stop.steps=2")
    return commands.folder / "run/checkpoints/step_2"


def test_shards_become_files_with_the_same_weights_and_the_run_goes_on_alone(
    commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = spread(commands)
    before = read_weights(find_checkpoint(path, "run"))
    refused = commands.run(*(sys.executable, str(ROOT / "scripts/export_hf.py"), "run=run", "out=hf"), check=False)
    assert "was written in shards, by several processes: python scripts/consolidate.py run=" in refused.stderr
    generate = (sys.executable, str(ROOT / "scripts/generate.py"), "run=run", "prompt=a", "max_new_tokens=3")
    text = commands.run(*generate, "temperature=0").stdout.splitlines()[0]  # shards are read as they are

    # One process evaluates what several trained, to what they evaluated.
    commands.run(sys.executable, str(ROOT / "scripts/evaluate.py"), "run=run", "json=evaluated.json")
    evaluated = json.loads((commands.folder / "evaluated.json").read_text())
    assert evaluated["loss"] == pytest.approx(commands.summary("run")["val_loss"], abs=1e-6)

    # Cut short at the last moment, there are both, and the files count.
    with monkeypatch.context() as context:
        context.setattr(module.shutil, "rmtree", raising_after_the_first_call())
        with pytest.raises(KeyboardInterrupt):
            module.consolidate(path)
    assert (path / "shards").exists()
    assert not find_checkpoint(path, "run").in_shards

    assert commands.run(*CONSOLIDATE, "run=run").stdout.strip() == str(path)  # what was cut short is brought to its end
    assert not (path / "shards").exists()
    after = load_file(path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert commands.run(*generate, "temperature=0").stdout.splitlines()[0] == text
    again = commands.run(*CONSOLIDATE, "run=run", check=False)
    assert again.returncode == 1
    assert "is in files already: there is nothing to do" in again.stderr
    commands.train("run_dir=run", "resume=auto", "stop.steps=3")
    assert commands.summary("run")["steps"] == 3


def raising_after_the_first_call() -> object:
    calls: list[Path] = []

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        calls.append(path)
        if len(calls) > 1:
            raise KeyboardInterrupt

    return rmtree


def test_a_shard_that_is_cut_off_is_noticed_before_anything_is_done(commands: Commands) -> None:
    path = spread(commands)
    shard = path / "shards/__1_0.distcp"
    whole = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-1])
    refused = commands.run(*CONSOLIDATE, "run=run", check=False)
    assert refused.returncode == 1
    assert "shards/__1_0.distcp has" in refused.stderr
    assert not (path / "model.safetensors").exists()

    shard.write_bytes(bytes(whole))  # as a disk that lost it leaves it
    generate = (sys.executable, str(ROOT / "scripts/generate.py"), "run=run", "prompt=a")
    for command in ((*CONSOLIDATE, "run=run"), generate):
        refused = commands.run(*command, check=False)
        (line,) = refused.stderr.splitlines()
        assert line == (
            f"error: the checkpoint {path} is damaged (shards: Weights only load failed): put back a whole copy of it, "
            "or train again in another run_dir"
        )
