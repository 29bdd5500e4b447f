"""A dense run made into a mixture of experts through the real commands: it goes on from where the dense one stood."""

from __future__ import annotations

import json
import shlex
import sys

import pytest
from command_line import ROOT, Commands

UPCYCLE = [sys.executable, str(ROOT / "scripts/upcycle.py")]
# The model of the tiny runs, whose first layer stays dense and whose second becomes experts that are whole copies.
MIXTURE = [
    "model=nano",
    "model/attention=gqa_4x32",
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.intermediate_size=48",
    "model.moe.num_experts=8",
    "model.moe.top_k=2",
    "model.moe.moe_intermediate_size=48",
]


@pytest.fixture
def dense(commands: Commands) -> Commands:
    tiny = [o for o in commands.tiny if not o.startswith("model.moe")]
    commands.run(sys.executable, str(ROOT / "train.py"), *tiny, "model.moe=null", "run_dir=dense", "stop.steps=40")
    return commands


def test_a_dense_run_goes_on_as_a_mixture(dense: Commands) -> None:
    out = dense.run(*UPCYCLE, "run=dense", "out=up", "json=up.json", *MIXTURE).stdout
    made = json.loads((dense.folder / "up.json").read_text())
    assert made["command"] in out
    assert made["total_params"] > made["active_params"]
    words = shlex.split(made["command"])
    assert words[:3] == ["accelerate", "launch", "train.py"]
    settings = [o for o in dense.tiny if not o.startswith(("model", "data.tokenizer", "optimizer="))]
    dense.run(sys.executable, str(ROOT / "train.py"), *words[3:], *settings, "run_dir=on", "optimizer.lr=1e-4")
    # Its first loss is that of the dense model's end, not that of a new model.
    before, after = dense.metrics("dense"), dense.metrics("on")
    assert after[0]["train/loss"] == pytest.approx(before[-1]["train/loss"], abs=0.3)
    assert after[0]["train/loss"] < before[0]["train/loss"] - 0.3
    assert "moe/max_violation" in after[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=nowhere", "out=up", "model=nano"], "run="),
        (["run=dense", "out=dense", "model=nano"], "is not empty"),
        (["run=dense", "out=up"], "model= is missing"),
        (["run=dense", "out=up", "model=dense_nano"], "is dense"),
        (["run=dense", "out=up", "model=nano"], "give the mixture the sizes of the dense model"),
        (["run=dense", "out=up", *MIXTURE[:-1], "model.moe.moe_intermediate_size=16"], "no multiple of 3"),
        (["run=dense", "out=up", "name=nano", *MIXTURE], "name=nano is taken"),
        (
            ["run=dense", "out=up", *MIXTURE, "precision=fp8_deepseek"],
            "precision=fp8_deepseek is a setting of training",
        ),
        (["run=dense", "out=up", *MIXTURE, "model.moe.nexperts=3"], "unknown key model.moe.nexperts"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_leaves_nothing(arguments: list[str], message: str, dense: Commands) -> None:
    result = dense.run(*UPCYCLE, *arguments, check=False)
    assert result.returncode in (1, 2)
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (dense.folder / "up").exists()
