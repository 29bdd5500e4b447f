"""Two runs beside each other: what differs, and what each took to get as far as the worse one."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import median

import pytest
from command_line import ROOT
from hypothesis import given
from hypothesis import strategies as st
from made_up_runs import write_run
from rich.console import Console

from moe_train.dashboard.comparison import _reached, compare, decreasing_fit, open_run
from moe_train.dashboard.comparison_table import show
from moe_train.dashboard.runs import Run


def compared(tmp_path: Path, a: dict, b: dict) -> dict:
    return compare(open_run(write_run(tmp_path / "a", **a)), open_run(write_run(tmp_path / "b", **b)))


def printed(content: dict) -> str:
    console = Console(file=io.StringIO(), width=200)
    show(content, console)
    return console.file.getvalue()


def test_only_settings_that_differ_are_listed_and_missing_is_not_null(tmp_path: Path) -> None:
    content = compared(tmp_path, {"lr": 1e-3}, {"lr": 3e-3, "num_experts": None})
    assert content["settings"] == [
        {"key": "model.moe.num_experts", "a": 16, "b": None, "only_in": "a"},
        {"key": "model.moe.top_k", "a": 4, "b": None, "only_in": "a"},
        {"key": "optimizer.lr", "a": 1e-3, "b": 3e-3, "only_in": None},
        {"key": "model.moe", "a": None, "b": None, "only_in": "b"},
    ]
    assert "no setting differs" in printed(compared(tmp_path, {}, {}))


def test_the_better_run_is_charged_up_to_where_it_passed_the_others_final_loss(tmp_path: Path) -> None:
    content = compared(tmp_path, {"final_loss": 2.5}, {"final_loss": 2.0, "tokens_per_second": 500.0})
    reached = content["reached"]
    assert (reached["measure"], reached["worse"], reached["target"]) == ("train/loss", "a", pytest.approx(2.5))
    # B's loss is 2 + 3 (1/√step - 1/√40): at 2.5 between two steps, linear between them.
    loss = {step: 2 + 3 * (step**-0.5 - 40**-0.5) for step in range(1, 41)}
    before = max(step for step in loss if loss[step] > 2.5)
    steps = before + (loss[before] - 2.5) / (loss[before] - loss[before + 1])
    axes = reached["axes"]
    assert axes["tokens"]["a"] == 40_000
    assert axes["tokens"]["b"] == pytest.approx(1000 * steps)
    assert axes["flops"]["b"] == pytest.approx(2.5e9 * steps)
    assert axes["seconds"]["b"] == pytest.approx(2 * steps)
    assert axes["usd"]["b"] == pytest.approx(2 * steps / 3600 * 0.05)
    assert axes["usd"]["ratio"] == pytest.approx(axes["usd"]["b"] / axes["usd"]["a"])
    assert {axis["reason"] for axis in axes.values()} == {None}


def test_runs_evaluated_often_enough_are_compared_in_bits_per_byte(tmp_path: Path) -> None:
    for name, final in (("a", 2.5), ("b", 2.0)):
        folder = write_run(tmp_path / name, final_loss=final)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for row in rows:
            row["val/bits_per_byte"] = 1.4 * row["train/loss"]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reached = compare(open_run(tmp_path / "a"), open_run(tmp_path / "b"))["reached"]
    assert (reached["measure"], reached["target"]) == ("val/bits_per_byte", pytest.approx(3.5))


def test_dollars_of_a_run_without_a_price_are_null_and_the_other_axes_are_not(tmp_path: Path) -> None:
    content = compared(tmp_path, {"final_loss": 2.5}, {"price": None})
    axes = content["reached"]["axes"]
    assert axes["usd"]["b"] is None
    assert axes["usd"]["reason"] == "no price (B)"
    assert axes["seconds"]["reason"] is None
    assert "no price (B)" in printed(content)


def test_what_was_passed_before_the_first_point_is_null_with_the_reason(tmp_path: Path) -> None:
    axes = compared(tmp_path, {"final_loss": 9.0}, {})["reached"]["axes"]
    assert axes["tokens"]["b"] is None
    assert axes["tokens"]["reason"] == "reached before its first logged point"


def test_losses_of_different_tokens_are_not_held_against_each_other(tmp_path: Path) -> None:
    content = compared(tmp_path, {}, {"summary": {"corpus_fingerprint": "0" * 32}})
    assert content["reached"]["measure"] is None
    assert "different text or tokenizer" in content["reached"]["axes"]["tokens"]["reason"]
    assert "different text or tokenizer" in printed(content)


def test_different_devices_and_prices_are_said_beside_seconds_and_dollars(tmp_path: Path) -> None:
    figures = {each["name"]: each for each in compared(tmp_path, {}, {"hardware": "h100", "price": 2.0})["figures"]}
    assert "different devices (cpu" in figures["seconds"]["note"]
    assert "different prices an hour, 0.05 (rental) and 2.0 (rental)" in figures["usd"]["note"]
    assert figures["tokens"]["note"] is None
    text = printed(compared(tmp_path, {}, {"hardware": "h100", "price": 2.0}))
    assert "[1] different devices" in text
    assert "[2] different prices" in text
    alike = compared(tmp_path, {}, {"seed": 1})
    assert {each["note"] for each in alike["figures"]} == {None}


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40))
def test_the_fit_never_rises_keeps_the_sum_and_leaves_a_falling_curve_alone(values: list[float]) -> None:
    fitted = decreasing_fit(values)
    assert all(one >= other - 1e-12 for one, other in pairwise(fitted))
    assert sum(fitted) == pytest.approx(sum(values), abs=1e-9)
    falling = sorted(set(values), reverse=True)
    assert decreasing_fit(falling) == falling


def test_two_runs_that_differ_by_noise_alone_cost_the_same() -> None:
    """Held against the raw last point of the one that ended higher, the median ratio was 0.83."""
    random, ratios = Random(0), []
    for _ in range(100):
        curves = [[2 + 3 * step**-0.5 + random.gauss(0, 0.03) for step in range(1, 101)] for _ in range(2)]
        rows = [[{"step": n, "train/loss": loss, "progress/tokens": n} for n, loss in enumerate(c, 1)] for c in curves]
        found = _reached(*(Run(Path(), {}, each, {}, [], "finished", []) for each in rows))
        ratios.append(found["axes"]["tokens"]["ratio"])
    assert median(ratios) == pytest.approx(1.0, abs=0.05)


def test_one_lucky_point_is_not_where_a_noisy_run_got_to() -> None:
    falling = [3.0 - 0.1 * step for step in range(20)]
    lucky = [*falling[:3], 1.2, *falling[4:]]
    first = next(index for index, loss in enumerate(decreasing_fit(lucky)) if loss <= 1.5)
    assert first >= 12


def script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/compare.py"), *arguments]
    return subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=120, check=False)


def test_the_command_prints_tables_and_writes_what_they_say(tmp_path: Path) -> None:
    write_run(tmp_path / "seed=0,x=1")
    write_run(tmp_path / "b", final_loss=1.5)
    result = script(tmp_path, "seed=0,x=1", "b", "json=out.json")
    assert result.returncode == 0, result.stderr
    assert "where A ended" in result.stdout
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["reached"]["worse"] == "a"
    assert content["b"]["folder"] == str(tmp_path / "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], "1 run folders are given: give two"),
        (["a", "nothing"], "nothing: there is no such folder"),
        (["a", "empty"], "empty is no run that can be compared: config.yaml is missing"),
        (["a", "b", "json=a"], "json=a exists already"),
        (["a", "empty/../a"], "both are the same run, empty/../a: give another"),
    ],
    ids=str,
)
def test_folders_that_cannot_be_compared_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    result = script(tmp_path, *arguments)
    assert result.returncode in (1, 2)
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
