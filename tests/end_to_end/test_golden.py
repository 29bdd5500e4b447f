"""Golden losses: a change that is not a change of mathematics leaves the losses of these runs as they are.

`losses.json` holds the first steps of a few arms. After a change that is meant to move them, write it anew with
`PYTHONPATH=tests python tests/end_to_end/test_golden.py` and say in the commit why they moved. The tolerance is for
other processors, whose sums are ordered differently; on one machine the losses are identical. Without AVX2 and AVX512
they differ by 2e-7, where numbers are rounded on the way (FP8, Muon's BF16) by up to 7e-5.

Weights begin wide: at the usual 0.02 experts add so little to a small model that losses stay within 1e-4 whoever
chooses them. Not in FP8, where wide weights would carry a rounding that falls otherwise into the third digit.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path

import pytest
from command_line import Commands

FILE = Path(__file__).with_name("losses.json")
WIDE = "model.initializer_range=0.15"
ROUNDED = ("fp8_deepseek", "fp8_hopper_rowwise", "muon_dropout_untied")  # on the way, which carries differences on
ARMS = {
    "gqa_moe": [],
    "mla_moe": ["model/attention=mla_4x32"],
    "mla_q_compressed": ["model/attention=mla_4x32", "model.attention.q_lora_rank=24"],
    "dense_twin": ["model.dense_twin_of_moe=equal_flops"],
    "muon_dropout_untied": [
        "optimizer=muon",
        "optimizer.lr=3e-3",
        "model.dropout=0.1",
        "model.tie_word_embeddings=false",
    ],
    "group_limited": ["model/moe=group_limited"],
    "batch_loss": ["model/moe=batch_loss"],
    "switch": ["model/moe=switch", "model.moe.top_k=1"],
    "expert_choice": ["model/moe=expert_choice"],
    "mtp_yarn_qk_norm": [
        "model/mtp=depth_2",
        "model/rope_scaling=yarn",
        "model.rope_scaling.original_max_position_embeddings=8",
        "model.attention.qk_norm=per_head",
    ],
    "fp8_deepseek": ["precision=fp8_deepseek", "precision.compute_dtype=float32"],
    "fp8_hopper_rowwise": [
        "precision=fp8_rowwise",
        "precision.compute_dtype=float32",
        "precision.fp8.accumulation=hopper",
        "model/attention=mla_4x32",
    ],
    "batch_ramp_segments": ["batch_ramp={start: 2, tokens: 512}", "schedule=deepseek_v3"],
    "losses_of_balance_and_z": ["model.moe.sequence_loss_weight=0.05", "z_loss_weight=1e-3"],
}


def losses(commands: Commands, arm: str) -> list[float]:
    wide = [] if arm.startswith("fp8") else [WIDE]
    commands.train(f"run_dir={arm}", "stop.steps=12", *wide, *ARMS[arm])
    return [row["train/loss"] for row in commands.metrics(arm)]


def tolerance(arm: str) -> float:
    """Of a loss, relative."""
    return 1e-4 if arm in ROUNDED else 1e-5


@pytest.mark.parametrize("arm", ARMS)
def test_the_losses_are_those_they_always_were(arm: str, commands: Commands) -> None:
    assert losses(commands, arm) == pytest.approx(json.loads(FILE.read_text())[arm], rel=tolerance(arm))


def test_an_arm_that_computed_what_another_does_would_be_noticed() -> None:
    kept = json.loads(FILE.read_text())
    assert set(kept) == set(ARMS)
    for arm, other in itertools.permutations(ARMS, 2):
        apart = max(abs(a - b) / b for a, b in zip(kept[arm], kept[other], strict=True))
        assert apart > 5 * tolerance(arm), (arm, other)


if __name__ == "__main__":
    from text import write_corpus

    with tempfile.TemporaryDirectory() as folder:
        made = Commands(Path(folder), write_corpus(Path(folder)), Path(folder) / "cache")
        FILE.write_text(json.dumps({arm: losses(made, arm) for arm in ARMS}, indent=1) + "\n")
