"""`python scripts/describe.py`: its figures, its mistakes in one line, and an architecture that is one file."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, Commands

Describe = Callable[..., subprocess.CompletedProcess[str]]

ARCHITECTURE = """
defaults:
  - nano
  - override moe: switch
  - _self_
name: mine
hidden_size: 64
num_hidden_layers: 5
moe:
  num_experts: 8
  top_k: 1
  first_k_dense_replace: 2
"""


@pytest.fixture
def describe(commands: Commands) -> Describe:
    """The command, run in a folder of its own."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return commands.run(sys.executable, str(ROOT / "scripts" / "describe.py"), *arguments, check=False)

    return run


def written(result: subprocess.CompletedProcess[str], path: Path) -> dict[str, Any]:
    assert result.returncode == 0, result.stdout + result.stderr
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_deepseek_v3_is_described_as_published(describe: Describe, tmp_path: Path) -> None:
    result = describe("model=deepseek_v3", "json=v3.json")
    content = written(result, tmp_path / "v3.json")
    assert content["total_params"] == 671_026_404_352
    assert content["active_params"] == pytest.approx(37.55e9, rel=1e-4)
    assert content["active_params_without_embedding"] == pytest.approx(36.6e9, rel=1e-3)
    assert content["flops_per_token"] == pytest.approx(250e9, rel=0.01)
    assert content["cache_elements_per_token"] == 61 * (512 + 64)
    assert sum(part["params"] for part in content["parts"]) == content["total_params"]
    assert sum(part["flops_per_token"] for part in content["parts"]) == pytest.approx(content["flops_per_token"])
    layers = {layer["layers"]: layer for layer in content["layers"]}
    assert list(layers) == ["embedding", "blocks 0 to 2", "blocks 3 to 60", "norm", "lm_head"]
    assert sum(layer["count"] * layer["params"] for layer in layers.values()) == content["total_params"]
    assert layers["blocks 3 to 60"]["tensors"]["ffn.experts.down_proj"] == [256, 7168, 2048]
    assert "671,026,404,352" in result.stdout
    assert "256 × 7,168 × 2,048" in result.stdout
    assert not result.stderr


def test_settings_change_what_is_described(describe: Describe, tmp_path: Path) -> None:
    settings = ["model.moe.num_experts=32", "model/attention=gqa_4x32", "model/mtp=depth_1", "vocab_size=1000"]
    settings += ["optimizer=adamw", "batch=512", "sequence_length=256", "compute_dtype=float32"]
    content = written(describe("model=nano", *settings, "json=nano.json"), tmp_path / "nano.json")
    assert (content["vocab_size"], content["notes"]) == (1000, [])
    assert content["cache_elements_per_token"] == 4 * 2 * 2 * 32
    assert content["mtp_params"] > 0
    bytes_of = {part["part"]: part["bytes"] for part in content["memory"]["parts"]}
    assert bytes_of["optimizer_states"] == 2 * bytes_of["gradients"] == 8 * content["total_params"]
    assert bytes_of["weight_copies"] == 0
    assert content["memory"]["bytes"] == sum(bytes_of.values())


def test_bytes_of_a_parameter_and_a_token_stand_beside_those_of_bf16_with_fp32_moments(
    describe: Describe, tmp_path: Path
) -> None:
    settings = ["optimizer=adamw", "optimizer.moments=bfloat16", "precision=fp8_deepseek"]
    result = describe("model=deepseek_v3", *settings, "json=v3.json")
    narrow, plain = written(result, tmp_path / "v3.json")["bytes_each"]
    assert narrow["settings"] == "fp8_deepseek, bfloat16; adamw, moments bfloat16"
    assert plain["settings"] == "bfloat16; adamw, moments float32"
    for row, states, copies in ((narrow, 4, 2 * (1 + 4 / 128)), (plain, 8, 2)):
        each = row["per_parameter"]
        assert each["weights"] == pytest.approx(each["gradients"], rel=1e-4) == pytest.approx(4, rel=1e-4)
        assert each["optimizer_states"] == states
        assert each["weight_copies"] == pytest.approx(copies, rel=0.01)  # of blocks alone
        assert each["together"] == pytest.approx(sum(each[k] for k in each if k != "together"))
    assert narrow["activations_per_token"] < 0.9 * plain["activations_per_token"]
    assert f"{narrow['activations_per_token']:,.0f}" in result.stdout

    rowwise = written(describe("model=nano", "precision=fp8_rowwise", "json=a.json"), tmp_path / "a.json")
    tiles = written(describe("model=nano", "precision=fp8_deepseek", "json=b.json"), tmp_path / "b.json")
    # It keeps the inputs of SwiGLUs in BF16.
    one, other = (each["bytes_each"][0]["activations_per_token"] for each in (rowwise, tiles))
    assert one > other

    wide = written(describe("model=nano", "precision=fp32", "json=wide.json"), tmp_path / "wide.json")
    assert wide["memory"]["compute_dtype"] == "float32"
    assert wide["bytes_each"][0]["settings"] == "float32; muon, moments float32"
    assert wide["bytes_each"][0]["per_parameter"]["weight_copies"] == 0
    assert any(row.get("all") == "float32" for row in wide["precision"]["rows"] if row["layer"] == "head")

    default = describe("model=nano", "json=nano.json")
    same = written(default, tmp_path / "nano.json")["bytes_each"]
    assert same[0] == same[1]
    assert default.stdout.count("moments float32") == 1


def test_a_new_architecture_is_one_yaml_file(describe: Describe, tmp_path: Path) -> None:
    (tmp_path / "architect's own" / "model").mkdir(parents=True)
    (tmp_path / "architect's own" / "model" / "mine.yaml").write_text(ARCHITECTURE)
    result = describe("model=mine", "--config-dir", "architect's own", "json=mine.json")
    content = written(result, tmp_path / "mine.json")
    assert content["model"] == "mine"
    assert [layer["layers"] for layer in content["layers"]] == ["embedding", "blocks 0 to 1", "blocks 2 to 4", "norm"]
    assert content["vocab_size"] == 4096
    assert "note: vocab_size= is not given: 4,096 assumed" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "error: model= is missing: choose one of base, "),
        (["model=deepseek_v9"], "error: there is no model=deepseek_v9: choose one of base, "),
        (["model=nano", "model.moe.nexperts=8"], "error: unknown key model.moe.nexperts: did you mean "),
        (["model=nano", "model.moe.top_k=99"], "top_k=99 is more than num_experts=16"),
        (["model=nano", "sequence=9"], "error: unknown argument sequence=9: did you mean sequence_length=?"),
        (["model=nano", "vocab_size=0"], "error: vocab_size=0: "),
        (["model=nano", "model/mtp=depth_2", "sequence_length=2"], "needs sequences longer than sequence_length=2"),
        (
            ["model=nano", "precision=fp32", "compute_dtype=bfloat16"],
            "contradicts precision=fp32, whose products are",
        ),
        (["model=nano", "--config-dir", "nowhere"], "error: --config-dir nowhere: there is no such folder"),
        (["model=nano", "--config-dir"], "error: --config-dir needs a folder"),
        (["model=nano", "json=nowhere/a.json"], "error: json=nowhere/a.json: there is no folder "),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = ROOT / "scripts" / "describe.py"
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    with pytest.raises(SystemExit) as ended:  # in this process: a new one takes a second
        runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr()
    assert ended.value.code in (1, 2)
    assert says in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_a_model_to_be_trained_here_is_described_at_the_length_of_a_run(describe: Describe, tmp_path: Path) -> None:
    for model, length in (("nano", 256), ("mixtral_8x7b", 4096)):
        content = written(describe(f"model={model}", f"json={model}.json"), tmp_path / f"{model}.json")
        assert content["sequence_length"] == length


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=deepseek_v3", "model/moe=switch"], "model/moe cannot be chosen here"),
        (["model=here/mine.yaml"], "--config-dir DIR"),
        (["model=nano", "model/moe=null"], "takes the name of one of its files"),
    ],
)
def test_what_hydra_says_of_groups_is_put_plainly(arguments: list[str], message: str, describe: Describe) -> None:
    result = describe(*arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
