"""Runs in FP8 as a user makes them: what is said of it, going on in another precision, accumulation."""

from __future__ import annotations

import json

import pytest
from command_line import ROOT, Commands

from moe_train.precision.support import multiplies_bfloat16

FP8 = ["precision=fp8_deepseek", "precision.compute_dtype=float32"]


def losses(commands: Commands, run: str) -> list[float]:
    return [row["train/loss"] for row in commands.metrics(run)]


def test_a_run_in_fp8_says_that_it_is_emulated_and_keeps_what_ran_in_what(commands: Commands) -> None:
    result = commands.train(*FP8, "run_dir=run")
    assert "rounded to FP8 and multiplied in FP32 (emulated)" in result.stderr
    rows = {row["layer"]: row for row in json.loads((commands.folder / "run/precision.json").read_text())}
    assert rows["attention.o_proj"]["forward"] == "e4m3 a tile, 2ⁿ · e4m3 a block"
    assert rows["router"]["all"] == "float32"


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "configs/precision").glob("fp8_*.yaml")))
def test_every_recipe_trains_alike_with_kernels_in_c_and_with_torch(recipe: str, commands: Commands) -> None:
    if not multiplies_bfloat16("cpu"):
        pytest.skip("the kernels take a CPU that multiplies BF16")
    for kernels in ("compiled", "torch"):
        settings = [f"precision={recipe}", "precision.compute_dtype=bfloat16", "tracking.log_every_steps=1"]
        result = commands.train(*settings, f"run_dir={kernels}", f"cpu_kernels={kernels}", "stop.steps=10")
        assert ("by the kernels in C" in result.stderr) == (kernels == "compiled")
    rows = json.loads((commands.folder / "compiled/precision.json").read_text())
    assert {row["multiplied_in"] for row in rows if "backend" in row} == {"bfloat16"}
    assert losses(commands, "compiled") == pytest.approx(losses(commands, "torch"), rel=0.01)
    found, expected = commands.metrics("compiled"), commands.metrics("torch")
    for operand in ("input", "weight", "gradient"):
        # The first step's operands differ by what BF16 products before them do; later ones are another run's.
        name = f"fp8/{operand}/underflow_rate"
        assert found[0][name] == pytest.approx(expected[0][name], rel=0.05, abs=1e-3)


def test_fp8_follows_fp32_closely_and_not_exactly(commands: Commands) -> None:
    commands.train(*FP8, "run_dir=fp8", "stop.steps=30")
    commands.train("run_dir=fp32", "stop.steps=30")
    narrow, wide = losses(commands, "fp8"), losses(commands, "fp32")
    assert narrow != wide
    assert narrow == pytest.approx(wide, rel=0.02)


def test_micro_batches_change_nothing_but_the_tokens_that_share_a_scale(commands: Commands) -> None:
    # Rounding along tokens, in the weight gradient, goes by tiles of 128 tokens of a micro-batch.
    commands.train(*FP8, "run_dir=whole", "stop.steps=10")
    commands.train(*FP8, "run_dir=cut", "stop.steps=10", "micro_batch_size=1")
    assert losses(commands, "cut") == pytest.approx(losses(commands, "whole"), rel=0.01)


def test_a_run_can_go_on_in_another_precision_and_be_killed_in_this_one(commands: Commands) -> None:
    settings = ["run_dir=run", "resume=auto", "checkpoint.every_steps=3"]
    commands.train(*FP8, *settings, "stop.steps=3")
    commands.train(*settings, "stop.steps=6")
    assert [row["step"] for row in commands.metrics("run")] == [1, 2, 3, 4, 5, 6]
    commands.train(*FP8, "run_dir=whole", "stop.steps=3")
    assert losses(commands, "run")[:3] == losses(commands, "whole")


def test_describe_shows_what_runs_in_what(commands: Commands) -> None:
    script = str(ROOT / "scripts/describe.py")
    result = commands.run("python", script, "model=nano", "precision=fp8_deepseek", "json=nano.json")
    assert "precision=fp8_deepseek" in result.stdout
    assert "FP8 products are summed in float32, on this machine by the backend emulated" in result.stdout
    rows = json.loads((commands.folder / "nano.json").read_text())["precision"]["rows"]
    assert sum("forward" in row for row in rows) >= 6
    result = commands.run("python", script, "model=nano", "precision=fp9", check=False)
    assert result.stderr.startswith("error: there is no precision=fp9: choose one of auto, bf16")
    assert len(result.stderr.splitlines()) == 1


def test_a_recipe_that_makes_no_sense_is_one_line(commands: Commands) -> None:
    for override, message in (
        ("precision.fp8.forward.activation.format=e3m4", "e3m4"),
        ("precision.fp8.forward.weight.scale_of=column", "column"),
        ("precision.fp8.power_of_two_inputs_of=[nothing]", "names nothing, and the model has"),
    ):
        result = commands.train(*FP8, override, check=False)
        assert result.returncode == 1
        errors = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
        assert len(errors) == 1
        assert message in errors[0]
