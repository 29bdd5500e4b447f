"""The forecasting commands: what they print and write, and what they refuse in one line."""

from __future__ import annotations

import json
import signal
import time
from typing import Any

import psutil
import pytest
from command_line import ROOT, Commands

SCRIPT = ["python", str(ROOT / "scripts/forecast.py")]


def asked(commands: Commands, *arguments: str) -> dict[str, Any]:
    commands.run(*SCRIPT, *arguments, "json=answer.json")
    content: dict[str, Any] = json.loads((commands.folder / "answer.json").read_text())
    return content


def test_a_probe_that_is_interrupted_takes_its_run_with_it(commands: Commands) -> None:
    settings = [setting for setting in commands.tiny if not setting.startswith("stop.")]
    probe = commands.start([*SCRIPT, "probe=true", "tokens=1e6", *settings])
    until = time.monotonic() + 60
    runs: list[psutil.Process] = []
    while not runs and time.monotonic() < until:
        runs = [
            each for each in psutil.Process(probe.pid).children(recursive=True) if "train.py" in str(each.cmdline())
        ]
        time.sleep(0.02)
    probe.terminate()
    said = probe.communicate(timeout=60)[1]
    assert probe.returncode == 128 + signal.SIGTERM
    assert "interrupted by SIGTERM" in said
    assert runs
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in runs)


def test_published_runs_come_with_the_promised_figures(commands: Commands) -> None:
    content = asked(commands, "published=true")
    keys = {"model", "kind", "published_gpu_hours", "predicted_gpu_hours", "interval", "ratio"}
    assert all(keys <= set(row) for row in content["rows"])
    assert content["median_error"] <= 0.15
    assert content["within_1_5x"] >= 0.93
    assert content["baseline_median_error"] > content["median_error"]
    assert content["baseline_within_1_5x"] < content["within_1_5x"]
    assert content["interval_coverage"] >= content["level"]


def test_parts_say_whether_a_device_could_hold_its_states(commands: Commands) -> None:
    parts = ("parts=true", "model=deepseek_v2_lite", "hardware=h800", "batch_size=64")
    alone = commands.run(*SCRIPT, *parts, "num_gpus=1").stdout
    assert "GB of states on each device of 80 GB: it cannot be trained in this layout" in alone
    cut = commands.run(*SCRIPT, *parts, "num_gpus=64", "sharding=fsdp2").stdout
    assert "GB of states on each device of 80 GB\n" in cut


def test_a_run_on_devices_one_does_not_have(commands: Commands) -> None:
    arguments = ["model=llama_3_1_8b", "tokens=1e12", "hardware=h100", "num_gpus=64", "price_usd_per_hour=3"]
    content = asked(commands, *arguments, "model.num_hidden_layers=16", "optimizer=adamw")
    assert content["usd"]["value"] == pytest.approx(3 * content["gpu_hours"]["value"])
    assert content["memory"]["layout"]["name"] == "fsdp2"
    assert content["total_params"] < 5e9  # half the layers


def test_the_price_of_a_launcher_is_taken_here_too(commands: Commands) -> None:
    commands.environment["MOE_TRAIN_PRICE_USD_PER_HOUR"] = "5"
    content = asked(commands, "model=olmoe_1b_7b", "tokens=1e12", "hardware=h100", "num_gpus=8")
    assert content["usd"]["value"] == pytest.approx(5 * content["gpu_hours"]["value"])


def test_what_fits(commands: Commands) -> None:
    rows = {row["model"]: row for row in asked(commands, "fit=true", "hardware=rtx_4090")["rows"]}
    assert rows["base"]["largest_micro_batch"] > 0
    assert rows["llama_3_1_8b"]["needs_activation_checkpointing"] is None


def test_more_fits_where_a_swiglus_input_is_kept_in_fp8(commands: Commands) -> None:
    (row,) = asked(commands, "fit=true", "hardware=rtx_4090", "model=base", "precision=fp8_deepseek")["rows"]
    (commands.folder / "answer.json").unlink()
    (wide,) = asked(commands, "fit=true", "hardware=rtx_4090", "model=base", "precision=bf16")["rows"]
    assert row["largest_micro_batch"] > wide["largest_micro_batch"]
    (commands.folder / "answer.json").unlink()
    rowwise = ["fit=true", "hardware=rtx_4090", "model=base", "precision=fp8_rowwise"]  # keeps that input in BF16
    assert asked(commands, *rowwise)["rows"][0]["largest_micro_batch"] < row["largest_micro_batch"]


def test_what_is_kept_in_fp8_fits_a_card_that_multiplies_it_in_another_format(commands: Commands) -> None:
    (row,) = asked(commands, "fit=true", "hardware=rtx_3090", "model=base", "precision=fp8_deepseek")["rows"]
    assert row["largest_micro_batch"] > 0


def test_a_probe_forecasts_a_run_here_and_says_how_near_it_came(commands: Commands) -> None:
    tiny = [o for o in commands.tiny if not o.startswith("stop.")] + ["hardware.price_usd_per_hour=3600"]
    commands.train("run_dir=run", "stop.steps=null", "stop.tokens=50000", "hardware.price_usd_per_hour=3600")
    content = asked(commands, "probe=true", "tokens=50000", *tiny, "against=run")
    # Other work on the cores can slow either by several times: only that the two agree in kind is asked here.
    assert 0.1 < content["against"]["wall_seconds"]["ratio"] < 10
    assert content["usd_total"]["value"] == pytest.approx(content["wall_seconds"]["value"], rel=1e-6)
    assert not (commands.folder / "probe").exists()


def test_deepseek_v3s_table_and_its_picture(commands: Commands) -> None:
    script = str(ROOT / "scripts/deepseek_v3_cost.py")
    result = commands.run("python", script, "plot=v3.svg", "json=v3.json")
    assert "$5,576,000" in result.stdout
    assert json.loads((commands.folder / "v3.json").read_text())["usd"] == 5_576_000
    assert (commands.folder / "v3.svg").read_text().lstrip().startswith("<?xml")
    again = commands.run("python", script, "plot=v3.svg", check=False)
    assert "plot=v3.svg exists already" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=nano"], "tokens= is missing"),
        (["model=nano", "tokens=0", "hardware=h100"], "tokens=0"),
        (["model=nano", "tokens=1e9"], "hardware= is missing: choose one of"),
        (["model=nano", "tokens=1e9", "hardware=h1000"], "there is no hardware=h1000"),
        (["model=nano", "tokens=1e9", "hardware=../h100"], "there is no hardware=../h100"),
        (["model=nano", "tokens=1e9", "hardware=cpu"], "probe=true"),
        (["model=nano", "tokens=1e9", "hardware=h100", "num_gpus=0"], "num_gpus=0"),
        (
            ["model=nano", "tokens=1e9", "hardware=h100", "num_gpus=2", "parallel=single"],
            "parallel=single is one device",
        ),
        (["model=dense_nano", "tokens=1e9", "hardware=h100", "num_gpus=2", "parallel=ep"], "has none"),
        (["model=nano", "tokens=1e9", "hardware=a100_80", "precision=fp8"], "multiplies no FP8"),
        (["model=nano", "tokens=1e9", "hardware=h100", "precision=int4"], "precision=int4"),
        (["model=nonesuch", "tokens=1e9", "hardware=h100"], "there is no model=nonesuch"),
        (["tokens=1e9", "hardware=h100"], "model= is missing"),
        (["published=true", "fit=true"], "different questions"),
        (["published=true", "tokns=5"], "did you mean tokens=?"),
        (["fit=true"], "hardware= is missing"),
        (["fit=true", "hardware=t4", "precision=fp8_deepseek"], "runs no kernel that keeps FP8"),
        (["fit=true", "hardware=h100", "num_gpus=8"], "num_gpus= does nothing with fit=true"),
        (["published=true", "model=nano"], "model=nano does nothing with published=true"),
        (["model=nano", "tokens=1e9", "hardware=h100", "against=x"], "against= goes with probe=true"),
        (["probe=true", "tokens=1e6", "against=nowhere"], "against=nowhere holds no finished run"),
        (["probe=true"], "tokens= is missing"),
        (["parts=true", "model=nano", "hardware=h800"], "batch_size= is missing"),
        (["parts=true", "model=nano", "hardware=rtx_4090", "batch_size=64"], "has no link bandwidths"),
        (
            ["parts=true", "model=nano", "hardware=h800", "batch_size=64", "pipeline_schedule=zb1p"],
            "pipeline_schedule=zb1p does nothing in one stage: give pipeline_parallel=N as well",
        ),
        (
            ["parts=true", "model=nano", "hardware=h800", "batch_size=64", "attention_kernel=flash"],
            "attention_kernel=flash: choose one of flash_attention_2, flash_attention_3",
        ),
        (
            ["model=nano", "tokens=1e9", "hardware=h800", "pipeline_schedule=dualpipe"],
            "pipeline_schedule= goes with parts=true",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_one_line(arguments: list[str], message: str, commands: Commands) -> None:
    result = commands.run(*SCRIPT, *arguments, check=False)
    assert result.returncode in (1, 2)
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr
