"""Killed and resumed runs against uninterrupted ones, to the last bit; several processes against one."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
from command_line import ROOT, Commands
from safetensors.torch import load_file

EXACT = [
    "deterministic=true",
    "model.dropout=0.2",
    "stop.steps=30",
    "checkpoint.every_steps=4",
    "eval.every_tokens=1280",
    "resume=auto",
]
TIMES = ("seconds", "usd", "throughput", "memory")


def figures(commands: Commands, run: str) -> list[dict[str, object]]:
    """The logged rows without what depends on the clock."""
    return [{k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in commands.metrics(run)]


def same_parameters(a: Path, b: Path) -> bool:
    one, other = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return one.keys() == other.keys() and all((one[k] == other[k]).all() for k in one)


@pytest.mark.parametrize(
    ("optimizer", "moments", "starts"),
    [
        ("adamw", ["moments=float32"], 3),
        ("muon", ["moments=float32"], 1),
        ("adamw", ["moments=bfloat16"], 1),
        ("adamw", ["moments=bfloat16", "stochastic_rounding=true"], 1),
        ("muon", ["moments=bfloat16", "stochastic_rounding=true"], 3),
    ],
    ids=["adamw", "muon", "adamw_bf16", "adamw_bf16_at_random", "muon_bf16_at_random"],
)
def test_a_run_killed_again_and_again_ends_bit_identical_to_one_never_interrupted(
    optimizer: str, moments: list[str], starts: int, commands: Commands
) -> None:
    log_every = 1 if optimizer == "adamw" else 3  # averages between logs must survive a kill as well
    settings = [*EXACT, f"optimizer={optimizer}", f"tracking.log_every_steps={log_every}", "micro_batch_size=2"]
    settings += [f"optimizer.{setting}" for setting in moments]
    commands.train("run_dir=whole", *settings)
    dice = random.Random(optimizer)
    kills = 0
    for _ in range(starts):
        process = commands.start(commands.train_command("run_dir=cut", *settings))
        metrics = commands.folder / "cut/metrics.jsonl"
        already = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        target = already + dice.randint(1, 9 // log_every)
        while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < target):
            time.sleep(0.005)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert kills >= max(1, starts - 1)
    commands.train("run_dir=cut", *settings)

    assert figures(commands, "cut") == figures(commands, "whole")
    assert same_parameters(commands.folder / "cut/checkpoints/step_30", commands.folder / "whole/checkpoints/step_30")
    attempts = json.loads((commands.folder / "cut/ledger.json").read_text())["attempts"]
    assert [a["status"] for a in attempts] == ["killed"] * kills + ["finished"]
    summary = commands.summary("cut")
    assert summary["wall_seconds"] >= sum(a["wall_seconds"] for a in attempts[:-1])
    assert summary["tokens"] == commands.summary("whole")["tokens"]
    costs = [row["cost/usd_total"] for row in commands.metrics("cut")]
    assert costs == sorted(costs)


def test_ctrl_c_saves_the_step_in_progress_and_the_run_goes_on_from_it(commands: Commands) -> None:
    command = commands.train_command("run_dir=run", "stop.steps=100000", "checkpoint.every_steps=null")
    process = commands.start(command)
    metrics = commands.folder / "run/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "which is saved: go on with resume=auto" in errors
    assert "Traceback" not in errors
    steps = commands.summary("run")["steps"]
    assert commands.summary("run")["status"] == "interrupted"
    commands.train("run_dir=run", f"stop.steps={steps + 3}", "resume=auto", "checkpoint.every_steps=null")
    assert [row["step"] for row in commands.metrics("run")] == list(range(1, steps + 4))


def test_a_new_run_from_a_checkpoint_starts_where_that_ended(commands: Commands) -> None:
    commands.train("run_dir=old")
    branch = ["run_dir=new", "init_from=old", "optimizer.lr=1e-4"]
    process = commands.start(commands.train_command(*branch, "stop.steps=100000"))
    metrics = commands.folder / "new/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)  # before its first checkpoint
    process.communicate()
    result = commands.train(*branch, "stop.steps=3", "resume=auto")
    assert "starting from the weights of" in result.stderr
    assert commands.metrics("new")[0]["train/loss"] < commands.metrics("old")[2]["train/loss"]


def test_weights_of_another_model_are_refused_with_the_setting(commands: Commands) -> None:
    commands.train("run_dir=old")
    for override, named in (
        ("model.moe.num_experts=16", "model.moe.num_experts=8, and this one has 16"),
        ("model/attention=mla_4x32", 'model.attention.kind="gqa"'),
        ("model/mtp=depth_1", "model.mtp.depth=0, and this one has 1"),
    ):
        refused = commands.train("run_dir=new", "init_from=old", override, check=False)
        assert refused.returncode == 1
        assert named in refused.stderr
        assert not (commands.folder / "new").exists()
    commands.train(
        "run_dir=new", "init_from=old", "model/moe=switch", "model.moe.top_k=1"
    )  # the same weights, used otherwise


def test_weights_are_not_continued_with_another_tokenizer(commands: Commands) -> None:
    commands.train("run_dir=old")
    refused = commands.train("run_dir=new", "init_from=old", "data.tokenizer=bpe", "data.vocab_size=300", check=False)
    assert refused.returncode == 1
    assert "trained with another tokenizer" in refused.stderr


def test_two_processes_follow_one_to_rounding(commands: Commands) -> None:
    weights = ["sequence_loss_weight=0.01", "batch_loss_weight=0.01", "router_z_loss_weight=0.001"]
    settings = [*(f"model.moe.{weight}" for weight in weights), "z_loss_weight=1e-4", "model/mtp=depth_1"]
    settings += ["stop.steps=10"]
    commands.train("run_dir=one", *settings)
    script = [str(ROOT / "train.py"), *commands.tiny]
    commands.run("torchrun", "--standalone", "--nproc-per-node", "2", *script, *settings, "run_dir=two")
    accelerated = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    accelerated += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    commands.environment["ACCELERATE_USE_CPU"] = "1"
    commands.run(*accelerated, *script, *settings, "run_dir=three", "activation_checkpointing=true")

    one = commands.metrics("one")
    for other in ("two", "three"):
        summary = commands.summary(other)
        assert summary["num_devices"] == 2
        assert summary["tokens"] == commands.summary("one")["tokens"]
        assert summary["val_loss"] == pytest.approx(commands.summary("one")["val_loss"], rel=1e-5)
        for a, b in zip(one, commands.metrics(other), strict=True):
            assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-5)
            assert b["train/grad_norm"] == pytest.approx(a["train/grad_norm"], rel=1e-4)
            assert b["moe/max_violation"] == pytest.approx(a["moe/max_violation"], abs=1e-6)
            for name in ("train/auxiliary_loss", "train/mtp_loss"):
                assert b[name] == pytest.approx(a[name], rel=1e-5)


def test_micro_batches_do_not_change_a_step(commands: Commands) -> None:
    # 17 blocks of text in batches of 4: the padded last block falls into some micro-batches and not into others.
    commands.train("run_dir=whole", "stop.steps=12")
    commands.train("run_dir=parts", "stop.steps=12", "micro_batch_size=1")
    for a, b in zip(commands.metrics("whole"), commands.metrics("parts"), strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-5)
        assert b["train/grad_norm"] == pytest.approx(a["train/grad_norm"], rel=1e-4)
        assert a["progress/tokens"] == b["progress/tokens"]
