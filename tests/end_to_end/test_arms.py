"""Every arm trains through the real command, and its run folder says what distinguishes it."""

from __future__ import annotations

import math

import pytest
import torch
from command_line import ROOT, Commands
from safetensors.torch import load_file

ARMS = {
    "loss_free": [],
    "group_limited": ["model/moe=group_limited"],
    "batch_loss": ["model/moe=batch_loss"],
    "sequence_loss": ["model/moe=sequence_loss"],
    "switch": ["model/moe=switch", "model.moe.top_k=1"],
    "gshard": ["model/moe=gshard"],
    "expert_choice": ["model/moe=expert_choice"],
    "mtp": ["model/mtp=depth_1"],
    "iso_parameter_twin": ["model.dense_twin_of_moe=equal_params"],
    "mqa": ["model/attention=mqa_4x32", "model.attention.qk_norm=per_head"],
}


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_learns_and_logs_its_own_figures(arm: str, commands: Commands) -> None:
    commands.train("run_dir=run", "optimizer.lr=1e-2", "stop.steps=12", *ARMS[arm])
    rows, summary = commands.metrics("run"), commands.summary("run")
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 0.1
    assert summary["usd_total"] > 0
    assert summary["flops_per_token"] > 0
    row = rows[-1]
    assert row["train/batch_size"] == 4
    assert summary["final_max_violation"] == row.get("moe/max_violation")
    assert summary["final_dropped_fraction"] == row.get("moe/dropped_fraction")
    assert summary["val_mtp_loss"] == row.get("val/mtp_loss")
    assert ("train/mtp_loss" in row) == ("train/mtp_weight" in row) == ("val/mtp_loss" in row) == (arm == "mtp")
    assert ("moe/dropped_fraction" in row) == (arm in ("switch", "gshard", "expert_choice"))
    assert ("moe/max_violation" in row) == (arm != "iso_parameter_twin")
    if arm in ("switch", "gshard", "batch_loss"):
        # At a perfectly even load the loss is alpha, 0.01; it cannot be far below.
        assert row["train/auxiliary_loss"] > 0.008
    if arm == "expert_choice":
        assert row["moe/max_violation"] == 0
    if arm == "mtp":
        assert abs(rows[0]["train/mtp_loss"] - math.log(320)) < 0.2  # the model knows nothing yet
        assert row["train/mtp_loss"] < rows[0]["train/mtp_loss"] - 0.1


def test_the_weight_of_mtp_changes_where_the_configuration_says_and_acts_from_that_step(commands: Commands) -> None:
    settings = ["stop.steps=6", "model/mtp=depth_1", "model.mtp.late_from=0.5"]
    commands.train("run_dir=falls", *settings)
    commands.train("run_dir=stays", *settings, "model.mtp.late_loss_weight=0.3")
    falls, stays = commands.metrics("falls"), commands.metrics("stays")
    assert [row["train/mtp_weight"] for row in falls] == [0.3] * 3 + [0.1] * 3
    assert [row["train/mtp_weight"] for row in stays] == [0.3] * 6
    same = [a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-6) for a, b in zip(falls, stays)]
    assert same[:4] == [True, True, True, False]  # the fourth step is the first whose gradient it weighs less


def test_biases_are_those_of_one_process_under_ranks_accumulation_and_recomputation(commands: Commands) -> None:
    settings = ["model/mtp=depth_1", "stop.steps=5", "batch_size=8", "optimizer.lr=1e-3"]
    commands.train("run_dir=one", *settings)
    script = [str(ROOT / "train.py"), *commands.tiny, *settings]
    commands.run(
        *("torchrun", "--standalone", "--nproc-per-node", "2", *script),
        *("run_dir=two", "micro_batch_size=2", "activation_checkpointing=true"),
    )
    one, two = (load_file(commands.folder / f"{run}/checkpoints/step_5/model.safetensors") for run in ("one", "two"))
    biases = [name for name in one if name.endswith("selection_bias")]
    assert len(biases) == 2  # the MoE layer's and the MTP module's
    for name in biases:
        assert one[name].abs().max() > 0
        assert torch.equal(one[name], two[name])


def test_the_bias_rests_after_its_part_of_the_run(commands: Commands) -> None:
    commands.train("run_dir=run", "stop.steps=8", "model.moe.bias_update_fraction=0.5", "checkpoint.every_steps=1")
    commands.train("run_dir=whole", "stop.steps=8")
    (name,) = (n for n in load_file(commands.folder / "whole/checkpoints/step_8/model.safetensors") if "bias" in n)
    steps = [load_file(commands.folder / f"run/checkpoints/step_{s}/model.safetensors")[name] for s in (7, 8)]
    assert torch.equal(*steps)
    # Four updates of 0.01 each, up or down.
    assert steps[1].abs().max().item() <= 0.04 + 1e-6
    whole = load_file(commands.folder / "whole/checkpoints/step_8/model.safetensors")[name]
    assert not torch.equal(whole, steps[1])


def test_the_recipe_runs_as_one_command_with_all_its_parts(commands: Commands) -> None:
    first = (ROOT / "configs/experiment/deepseek_v3_recipe.yaml").read_text().splitlines()[1]
    assert first == "# accelerate launch train.py experiment=deepseek_v3_recipe"
    # On a narrower model, over an eightieth of its tokens.
    kept = [o for o in commands.tiny if not o.startswith(("model", "batch_size", "optimizer", "stop"))]
    small = ["model.hidden_size=48", "model.num_hidden_layers=2", "model.intermediate_size=64", "stop.tokens=24000"]
    ramp = ["batch_ramp.tokens=760", "run_dir=run"]
    words = first.removeprefix("# accelerate launch train.py ").split()
    commands.run("python", str(ROOT / "train.py"), *words, *kept, *small, *ramp)
    rows = commands.metrics("run")
    assert [rows[0]["train/batch_size"], rows[-1]["train/batch_size"]] == [4, 20]
    assert [rows[0]["train/mtp_weight"], rows[-1]["train/mtp_weight"]] == [0.3, 0.1]
    assert rows[-1]["train/lr"] == pytest.approx(0.0332 * max(row["train/lr"] for row in rows))
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 0.5
    assert rows[-1]["train/auxiliary_loss"] > 0


def test_a_context_extension_goes_on_from_a_shorter_phase(commands: Commands) -> None:
    mla = ["model/attention=mla_4x32", "optimizer.lr=1e-2"]
    commands.train("run_dir=short", "stop.steps=60", "eval.max_tokens=null", *mla)
    longer = ["data.sequence_length=128", "batch_size=2", "init_from=short", *mla, "optimizer.lr=1e-4", "stop.steps=4"]
    yarn = ["model/rope_scaling=yarn", "model.rope_scaling.original_max_position_embeddings=32"]
    commands.train("run_dir=long", *longer, *yarn)
    short, long = commands.metrics("short"), commands.metrics("long")
    assert long[0]["train/loss"] < short[0]["train/loss"] - 0.5
    assert commands.summary("long")["status"] == "finished"
