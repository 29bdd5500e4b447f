"""Dollars of real runs: against a stopwatch outside, after kills, within limits, and summed up by the ledger."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, Commands

from moe_train.cost.budget import GRACE_SECONDS

PRICE = 3600.0  # dollars an hour of the one core: a second costs a dollar
PRICED = [f"hardware.price_usd_per_hour={PRICE:g}"]
CLOCK = 0.5  # seconds: interpreter's end and scheduling, which nobody inside can see


def ledger_of(commands: Commands, *arguments: str) -> dict:
    commands.run("python", str(ROOT / "scripts/ledger.py"), "json=bill.json", *arguments)
    content = json.loads((commands.folder / "bill.json").read_text())
    (commands.folder / "bill.json").unlink()
    return content


def test_the_bill_is_the_stopwatch_times_the_price_and_stands_in_the_ledger(commands: Commands) -> None:
    began = time.monotonic()
    process = commands.start(commands.train_command("run_dir=run", *PRICED))
    process.communicate()
    seen = time.monotonic() - began
    summary = commands.summary("run")
    assert summary["usd_total"] == pytest.approx(seen, abs=CLOCK)
    assert summary["usd_total"] == pytest.approx(summary["wall_seconds"] * PRICE / 3600, rel=1e-9)
    (row,) = ledger_of(commands)["rows"]
    assert row["usd_total"] == pytest.approx(summary["usd_total"], rel=1e-9)
    assert (row["group"], row["runs"], row["usd"]["other"]) == ("moe_train", 1, row["usd_total"])


def test_a_killed_attempt_is_paid_for_to_a_heartbeat_and_again_when_it_goes_on(commands: Commands) -> None:
    settings = ["run_dir=run", "resume=auto", "checkpoint.every_steps=5", "stop.steps=100000", *PRICED]
    began = time.monotonic()
    process = commands.start(commands.train_command(*settings))
    metrics = commands.folder / "run/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 50):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    seen = time.monotonic() - began
    lines = [json.loads(line) for line in (commands.folder / "outputs/ledger.jsonl").read_text().splitlines()]
    # From the shared file alone: a line falls due a second after the last one, and a heartbeat comes every second.
    heartbeats, slack = 2.0, 0.5
    assert seen - heartbeats - slack < lines[-1]["usd"] <= seen
    commands.train(*settings, "stop.steps=1")  # beyond it already: closes the run
    first, second = ledger_attempts(commands)
    assert (first["status"], second["status"]) == ("killed", "finished")
    assert commands.summary("run")["usd_total"] == pytest.approx(first["usd"] + second["usd"], rel=1e-6)
    assert second["lost_seconds"] == pytest.approx(commands.summary("run")["lost_seconds"])


def ledger_attempts(commands: Commands) -> list[dict]:
    lines = [json.loads(line) for line in (commands.folder / "outputs/ledger.jsonl").read_text().splitlines()]
    return list({line["id"]: line for line in lines}.values())


def test_owned_devices_cost_wear_and_energy_and_the_price_of_a_launcher_is_taken(commands: Commands) -> None:
    owned = ["cost.basis=owned", "cost.usd_per_kwh=0.5", "cost.life_hours=1000", "hardware.purchase_usd=500"]
    commands.train("run_dir=owned", *owned, "cost.watts=2000", "cost.purpose=final")
    summary = commands.summary("owned")
    wear = 500 / 1000 * summary["wall_seconds"] / 3600
    assert summary["cost_basis"] == "owned"
    assert summary["energy_source"] is not None  # stated, or a counter where there is one
    assert summary["usd_total"] == pytest.approx(wear + summary["energy_kwh"] * 0.5, rel=1e-3)
    assert summary["usd_train"] < summary["usd_total"]
    commands.environment["MOE_TRAIN_PRICE_USD_PER_HOUR"] = "7.5"
    commands.train("run_dir=rented", "cost.purpose=seed")
    assert commands.summary("rented")["price_usd_per_hour"] == 7.5
    total = ledger_of(commands, "by=run")["total"]
    assert total["usd_ownership"] == pytest.approx(wear, rel=1e-3)
    assert total["usd_energy"] == pytest.approx(summary["energy_kwh"] * 0.5, rel=1e-3)
    assert total["usd_rent"] == pytest.approx(commands.summary("rented")["usd_total"], rel=1e-3)
    assert total["usd"]["final"] == pytest.approx(summary["usd_total"], rel=1e-3)


def test_a_limit_in_dollars_is_overshot_by_a_step_at_most_with_the_rate_annealed(commands: Commands) -> None:
    commands.train("run_dir=run", "stop.steps=null", "stop.usd=9", "tracking.log_every_steps=20", *PRICED)
    summary, rows = commands.summary("run"), commands.metrics("run")
    step = max(row["throughput/step_seconds"] for row in rows) * PRICE / 3600
    assert summary["stopped_by"] == "stop.usd=9.0"
    assert summary["usd_total"] <= 9 + step + CLOCK
    assert rows[-1]["train/lr"] < 0.1 * max(row["train/lr"] for row in rows)


def test_a_limit_that_start_up_uses_up_is_an_error_and_the_seconds_are_paid_for(commands: Commands) -> None:
    result = commands.train("stop.usd=0.001", *PRICED, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: stop.usd=0.001 was used up before the first step")
    (row,) = ledger_of(commands)["rows"]
    assert row["attempts_by_status"] == {"failed": 1}
    assert row["usd"]["unfinished"] > 0.1


def to_end(attempt: dict[str, Any]) -> float:
    """Dollars that a pool keeps for a job to end: more than such a short run costs."""
    return float(GRACE_SECONDS * attempt["usd"] / attempt["wall_seconds"])


def test_a_grid_starts_no_job_that_its_budget_cannot_pay_for(commands: Commands) -> None:
    seeds = ",".join(map(str, range(20)))
    grid = commands.train_command("-m", f"seed={seeds}", "hydra.launcher.jobs=1", *PRICED)
    name = "cost.sweep='my sweep, it\\'s = this'"
    first = commands.run(*grid, "seed=0", name, check=False)
    assert first.returncode == 0, first.stderr
    (one,) = ledger_attempts(commands)
    budget = 3.5 * one["usd"] + to_end(one)
    result = commands.run(*grid, name, f"budget.usd={budget}", check=False)
    assert result.returncode == 1
    assert "not started" in result.stderr
    attempts = ledger_attempts(commands)
    assert {attempt["sweep"] for attempt in attempts} == {"my sweep, it's = this"}
    assert 2 <= len(attempts) < 20
    assert sum(attempt["usd"] for attempt in attempts) <= budget + CLOCK


def test_a_job_that_the_budget_ended_keeps_its_checkpoint_and_is_followed_by_none(commands: Commands) -> None:
    grid = commands.train_command("-m", "hydra.launcher.jobs=1", *PRICED)
    commands.run(*grid, "seed=7", "stop.steps=1")  # what a start costs here: budgets are enough on any machine
    (start,) = ledger_attempts(commands)
    budget = 5 * start["usd"] + 2 * to_end(start)
    endless = ["seed=0,1,2", "stop.steps=1000000"]
    result = commands.run(*grid, *endless, f"budget.usd={budget}", check=False)
    assert result.returncode == 1
    _, attempt = ledger_attempts(commands)
    assert attempt["status"] == "interrupted"
    assert attempt["usd"] <= budget + CLOCK
    assert "was used up: 2 of 3 not started" in result.stderr
    assert list(Path(attempt["run"]).glob("checkpoints/step_*"))
    # The same command knows what it has spent.
    again = commands.run(*grid, *endless, f"budget.usd={budget}", check=False)
    assert len(ledger_attempts(commands)) == 2
    assert "3 of 3 not started" in again.stderr


def test_a_ledger_that_cannot_be_written_any_more_costs_no_run(commands: Commands) -> None:
    process = commands.start(commands.train_command("run_dir=run", "stop.steps=400", *PRICED))
    ledger = commands.folder / "outputs/ledger.jsonl"
    while not ledger.exists() or not ledger.read_text():
        time.sleep(0.01)
    ledger.unlink()
    ledger.mkdir()
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "cannot be written" in errors
    assert commands.summary("run")["status"] == "finished"


def test_a_run_that_its_budget_ends_is_annealed_but_not_finished(commands: Commands) -> None:
    commands.train("stop.steps=1", *PRICED)
    budget = 3 * float(ledger_attempts(commands)[0]["usd"])
    endless = ["run_dir=run", "stop.steps=1000000", "tracking.log_every_steps=50", *PRICED]
    commands.train(*endless, f"budget.usd={budget}")
    summary = commands.summary("run")
    assert (summary["status"], summary["stopped_by"]) == ("out_of_budget", f"budget.usd={budget}")
    assert ledger_of(commands)["total"]["usd"]["unfinished"] == pytest.approx(summary["usd_total"])
    goes_on = commands.train(*endless, "resume=auto", f"budget.usd={2 * budget}")
    assert "going on from step" in goes_on.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cost.basis=owned"], "give cost.usd_per_kwh="),
        (["cost.ledger=/proc/nothing/ledger.jsonl"], "cannot be written"),
        (["budget.usd=1", "hardware=a100_40", "hardware.price_usd_per_hour=null"], "budget.usd=1 needs a price"),
        (["cost.ledger=/dev/full"], "is no ordinary file"),
        (["stop.usd=1", "cost.basis=owned", "cost.usd_per_kwh=1", "hardware.purchase_usd=1"], "give cost.watts="),
        (["hardware.peak_tflops.bfloat16=989e12"], "hardware.peak_tflops.bfloat16=989000000000000.0"),
        (["cost.purpose=fun"], "cost.purpose"),
        (["cost.watts=-5"], "cost.watts=-5"),
        (["cost.life_hours=0"], "cost.life_hours=0"),
    ],
    ids=str,
)
def test_settings_of_cost_that_make_no_sense_are_one_line(
    arguments: list[str], message: str, commands: Commands
) -> None:
    result = commands.train(*arguments, check=False)
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_missing_ledger_and_an_unknown_final_run_are_one_line(commands: Commands) -> None:
    script = ["python", str(ROOT / "scripts/ledger.py")]
    for arguments, message in ((["ledger=nowhere"], "there is no ledger"), (["by=week"], "by=week")):
        result = commands.run(*script, *arguments, check=False)
        assert result.returncode in (1, 2)
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_energy_of_training_is_of_its_clock_however_often_a_run_logs(commands: Commands) -> None:
    # 1 MW at a dollar a kWh, and nothing for the device: 1 / 3.6 of a dollar a second of either clock.
    cost = ["cost.basis=owned", "hardware.purchase_usd=0.001", "cost.watts=1e6", "cost.usd_per_kwh=1"]
    commands.train("run_dir=run", *cost, "stop.steps=30", "tracking.log_every_steps=1", "eval.every_tokens=2560")
    summary = commands.summary("run")
    assert summary["usd_train"] / summary["train_seconds"] == pytest.approx(1 / 3.6, rel=0.01)
