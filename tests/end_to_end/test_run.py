"""What one run leaves behind, checked by counting it again."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import time

import pytest
from command_line import ROOT, Commands
from safetensors import safe_open

pytestmark = pytest.mark.xdist_group("finished")

SUMMARY_KEYS = [
    "status",
    "steps",
    "tokens",
    "total_params",
    "active_params",
    "flops_per_token",
    "train_seconds",
    "wall_seconds",
    "tokens_per_second",
    "model_flops_utilization",
    "final_train_loss",
    "val_loss",
    "val_bits_per_byte",
    "usd_train",
    "usd_total",
    "usd_per_million_tokens",
    "usd_per_million_tokens_all_in",
    "price_usd_per_hour",
    "price_source",
    "energy_kwh",
    "hardware",
    "num_devices",
    "num_threads",
    "peak_memory_bytes",
    "corpus",
    "corpus_fingerprint",
    "config_hash",
    "seed",
    "versions",
]

METRICS = [
    "train/loss",
    "train/grad_norm",
    "train/lr",
    "throughput/tokens_per_second",
    "throughput/tokens_per_second_per_device",
    "throughput/model_flops_utilization",
    "throughput/step_seconds",
    "throughput/data_wait_fraction",
    "cost/usd_train",
    "cost/usd_total",
    "cost/usd_per_million_tokens",
    "cost/energy_kwh",
    "progress/tokens",
    "progress/flops",
    "moe/max_violation",
    "moe/load_entropy",
    "moe/dead_experts",
    "moe/layer_0/max_violation",
    "memory/peak_bytes",
]


def test_the_summary_has_every_promised_key_and_agrees_with_itself(finished: Commands) -> None:
    summary = finished.summary("run")
    assert set(SUMMARY_KEYS) <= set(summary)
    assert summary["status"] == "finished"
    assert summary["steps"] == 120
    assert summary["tokens"] == 120 * 4 * 32
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["train_seconds"])
    hourly = summary["price_usd_per_hour"] * summary["num_devices"]
    assert summary["usd_total"] == pytest.approx(hourly * summary["wall_seconds"] / 3600)
    assert summary["usd_train"] == pytest.approx(hourly * summary["train_seconds"] / 3600)
    assert summary["usd_per_million_tokens"] == pytest.approx(summary["usd_train"] / summary["tokens"] * 1e6)
    assert summary["train_seconds"] < summary["wall_seconds"]
    rate = summary["flops_per_token"] * summary["tokens_per_second"]
    assert summary["model_flops_utilization"] == pytest.approx(rate / (summary["peak_tflops"] * 1e12))


def test_the_parameters_counted_by_formula_are_those_saved(finished: Commands) -> None:
    (path,) = (finished.folder / "run/checkpoints").glob("step_120")
    with safe_open(path / "model.safetensors", "pt") as weights:
        sizes = {k: math.prod(weights.get_slice(k).get_shape()) for k in weights.keys()}  # noqa: SIM118 (no mapping)
    assert finished.summary("run")["total_params"] == sum(n for k, n in sizes.items() if "selection_bias" not in k)


def test_the_model_learned_far_beyond_the_unigram_entropy_of_its_text(finished: Commands) -> None:
    rows = finished.metrics("run")
    assert rows[-1]["train/loss"] < 0.8 * rows[0]["train/loss"]
    summary = finished.summary("run")
    assert summary["val_bits_per_byte"] == pytest.approx(rows[-1]["val/bits_per_byte"])
    assert summary["val_bits_per_byte"] < summary["unigram_bits_per_byte"]


def test_every_step_is_logged_once_with_every_promised_metric(finished: Commands) -> None:
    rows = finished.metrics("run")
    assert [row["step"] for row in rows] == list(range(1, 121))
    assert all(set(METRICS) <= set(row) for row in rows)
    evaluated = [row["step"] for row in rows if "val/loss" in row]
    assert evaluated == [60, 120]
    assert [row["progress/tokens"] for row in rows] == [128 * n for n in range(1, 121)]
    assert all(a["cost/usd_total"] < b["cost/usd_total"] for a, b in itertools.pairwise(rows))


def test_the_learning_rate_warms_up_holds_and_anneals_to_the_end(finished: Commands) -> None:
    rates = [row["train/lr"] for row in finished.metrics("run")]
    peak = max(rates)
    assert 0 < rates[0] < peak
    assert rates[60] == peak
    assert rates[-1] < 0.05 * peak


def test_the_closing_table_shows_the_result_and_how_to_look_at_it(finished: Commands) -> None:
    for word in ("bits per byte", "tokens/s", "cost per million tokens", "utilisation", "wandb leet", "wandb sync"):
        assert word in finished.output, word


def test_a_cpu_is_measured_where_no_rate_is_given(finished: Commands, commands: Commands) -> None:
    summary = finished.summary("run")
    assert (
        " ".join(finished.output.replace("│", " ").split()).count("float32 matrix product measured at the start") == 1
    )
    assert 1e-4 < summary["model_flops_utilization"] < 1
    given = commands.train("run_dir=run", "stop.steps=2").stdout
    assert "measured at the start" not in given


def test_wandbs_own_reader_finds_the_same_figures_in_the_offline_run(finished: Commands) -> None:
    (file,) = (finished.folder / "run/wandb").glob("offline-run-*/run-*.wandb")
    result = finished.run("wandb", "leet", "inspect", "--json", str(file))
    assert all(f'"{name}"' in result.stdout for name in ("cost/usd_total", "val/bits_per_byte", "moe/max_violation"))
    last = finished.metrics("run")[-1]
    assert str(last["progress/tokens"]) in result.stdout


def test_dollars_agree_with_a_stopwatch_from_outside(commands: Commands) -> None:
    began = time.monotonic()
    commands.train("run_dir=run", "stop.steps=60", "eval.max_tokens=null")
    outside = time.monotonic() - began
    summary = commands.summary("run")
    expected = summary["price_usd_per_hour"] * outside / 3600
    # Half a second is allowed for what the process does after its last figure is written.
    assert expected * (1 - 0.5 / outside) - 1e-9 <= summary["usd_total"] * 1.01
    assert summary["usd_total"] <= expected * 1.01


def test_generation_is_greedy_at_temperature_zero_and_repeats_for_a_seed(finished: Commands) -> None:
    def text(*arguments: str) -> str:
        command = [
            "python",
            str(ROOT / "scripts/generate.py"),
            "run=run",
            "prompt=the quick ",
            "max_new_tokens=12",
            *arguments,
        ]
        return finished.run(*command).stdout

    greedy = text("temperature=0")
    assert greedy.startswith("the quick ")
    assert greedy == text("temperature=0", "seed=5")
    sampled = text("temperature=1.5", "seed=1", "json=out.json")
    assert sampled == text("temperature=1.5", "seed=1")
    assert sampled != text("temperature=1.5", "seed=2")
    assert json.loads((finished.folder / "out.json").read_text())["text"] == sampled.rstrip("\n")


def test_a_finished_run_is_shown_and_not_made_again(finished: Commands) -> None:
    before = (finished.folder / "run/metrics.jsonl").stat().st_mtime_ns
    result: subprocess.CompletedProcess[str] = finished.train(
        "run_dir=run",
        "optimizer.lr=1e-2",
        "tracking.wandb=offline",
        "stop.steps=120",
        "eval.every_tokens=7680",
        "resume=auto",
    )
    assert "finished already" in result.stderr
    assert (finished.folder / "run/metrics.jsonl").stat().st_mtime_ns == before
