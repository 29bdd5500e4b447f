"""A run here forecast from its own first steps: twenty of them, made by the real command on the device at hand.

What a probe measures (start-up, seconds a token once warm, evaluations, the rest) is put together for the whole run.
The interval goes from the fastest to the slowest stretch of three steps: what the machine did within a minute, not what
it may do tonight. `compare` says how near a forecast came once the run is made.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from moe_train.errors import UserError
from moe_train.forecast.interval import Interval
from moe_train.launch import launch_job
from moe_train.sweeps.running import Process
from moe_train.sweeps.runs import last_words
from moe_train.sweeps.warm import WarmStarts

STEPS, WARM_UP, STRETCH = 20, 8, 3  # nano's steps still fall from 0.32 to 0.24 s over the first eight
# What makes a run a probe, whatever else it is told.
_SETTINGS = (
    f"stop={{steps: {STEPS}, tokens: null, flops: null, seconds: null, usd: null}}",
    "tracking=none",
    "tracking.log_every_steps=1",
    "++precision.health=null",  # which counts on logged steps: here on every one, in a run on one of ten
    "checkpoint.every_steps=null",
    "cost.purpose=tuning",
    "resume=null",
)


def probe(overrides: Sequence[str], tokens: int) -> dict[str, Any]:
    """What `train.py OVERRIDES stop.tokens=TOKENS` will take here. Raises UserError where the probe fails."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "probe"
        status = launch_job([*overrides, *_SETTINGS, f"run_dir={run}"])
        if status:
            raise UserError(f"the probe ended with exit status {status}: correct what it says above")
        return _of_run(run, tokens)


def probe_of_job(overrides: Sequence[str], tokens: int) -> dict[str, Any]:
    """The same of one of many runs that a pool makes: from a fork, once all is there that is made only once.

    Text is prepared and kernels are compiled by a step before it: 8 of 12 s to a first step were, and counted for every
    run of a claim, some seconds long, they made five times its cost.
    """
    with tempfile.TemporaryDirectory() as folder, WarmStarts() as start:
        for run in (Path(folder) / "once", Path(folder) / "probe"):
            log = run.with_suffix(".log")
            steps = ["stop.steps=1", "eval.max_tokens=1"] if run.name == "once" else []
            with log.open("a") as output:
                status = _end_of(start([*overrides, *_SETTINGS, *steps, f"run_dir={run}"], output, {}))
            if status:
                raise UserError(f"the probe ended with exit status {status}: {last_words(log)}")
        return _of_run(run, tokens)


def _end_of(job: Process) -> int:
    """Its exit status. What ends the caller meanwhile, a signal above all, ends the job first."""
    try:
        while (status := job.poll()) is None:
            time.sleep(0.05)
        return status
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        while job.poll() is None:
            time.sleep(0.05)
        raise


def _of_run(run: Path, tokens: int) -> dict[str, Any]:
    summary = json.loads((run / "summary.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    config = yaml.safe_load((run / "config.yaml").read_text())
    return extrapolated(summary, rows, config, tokens)


def extrapolated(
    summary: dict[str, Any], rows: list[dict[str, Any]], config: dict[str, Any], tokens: int
) -> dict[str, Any]:
    """The whole run's figures from a probe's summary, metrics and configuration."""
    per_token = _seconds_per_token(rows)
    every = config["eval"]["every_tokens"]
    evaluations = 1 + (0 if every is None else (tokens - 1) // every)
    made = max(1, sum(row.get("val/loss") is not None for row in rows))  # one at the end, and any between its steps
    evaluation = summary["evaluation_seconds"] / made
    rest = summary["wall_seconds"] - summary["startup_seconds"] - summary["train_seconds"] - made * evaluation
    around_steps = summary["startup_seconds"] + evaluations * evaluation + rest
    train = per_token * tokens
    wall = Interval(*(seconds + around_steps for seconds in (train.value, train.low, train.high)))
    price, devices = summary["price_usd_per_hour"], summary["num_devices"]
    # Energy of owned devices follows the probe's own mean power.
    usd_per_second = None if summary["usd_total"] is None else summary["usd_total"] / summary["wall_seconds"]
    energy = None if summary["energy_kwh"] is None else summary["energy_kwh"] / summary["wall_seconds"]
    return {
        "model": config["model"]["name"],
        "config_hash": summary["config_hash"],
        "tokens": tokens,
        "device": summary["device_name"],
        "hardware": summary["hardware"],
        "num_devices": devices,
        "num_threads": summary["num_threads"],
        "total_params": summary["total_params"],
        "active_params": summary["active_params"],
        "flops_per_token": summary["flops_per_token"],
        "startup_seconds": summary["startup_seconds"],
        "evaluations": evaluations,
        "evaluation_seconds": evaluation,
        "tokens_per_second": asdict(per_token.under(1.0)),
        "train_seconds": asdict(train),
        "wall_seconds": asdict(wall),
        "device_hours": asdict(wall * (devices / 3600)),
        "price_usd_per_hour": price,
        "usd_total": None if usd_per_second is None else asdict(wall * usd_per_second),
        "energy_kwh": None if energy is None else asdict(wall * energy),
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "versions": summary["versions"],
    }


def _seconds_per_token(rows: list[dict[str, Any]]) -> Interval:
    """Of the warm steps: the mean, and the fastest and slowest stretch."""
    warm = rows[WARM_UP:]
    if len(warm) < STRETCH:
        raise UserError(f"the probe made {len(rows)} steps, too few to measure: give data of more than {STEPS} steps")
    before = [row["progress/tokens"] for row in rows[WARM_UP - 1 : -1]]
    tokens = [row["progress/tokens"] - earlier for row, earlier in zip(warm, before)]
    seconds = [row["throughput/step_seconds"] for row in warm]
    stretches = [
        sum(seconds[i : i + STRETCH]) / sum(tokens[i : i + STRETCH]) for i in range(0, len(warm) - STRETCH + 1, STRETCH)
    ]
    return Interval(sum(seconds) / sum(tokens), min(stretches), max(stretches))


def compare(forecast: dict[str, Any], run: Path) -> dict[str, Any]:
    """Forecast and truth of the finished run in `run`: ratios of forecast over what it took. Raises UserError."""
    took = finished(run)
    off = abs(took["tokens"] / forecast["tokens"] - 1)
    if took["status"] != "finished" or off > 0.05:
        raise UserError(
            f"against={run} is {took['status']} after {took['tokens']:,} tokens, and {forecast['tokens']:,} are "
            "forecast: give a finished run of as many"
        )
    found: dict[str, Any] = {"run": str(run), "took": took}
    for key in ("wall_seconds", "usd_total", "tokens_per_second"):
        predicted = forecast[key]
        known = predicted is not None and took[key]
        found[key] = {"ratio": predicted["value"] / took[key], "held": _holds(predicted, took[key])} if known else None
    return found


def finished(run: Path) -> dict[str, Any]:
    """What the run in `run` took. Raises UserError where there is none."""
    try:
        summary = json.loads((run / "summary.json").read_text())
        return {key: summary[key] for key in ("tokens", "wall_seconds", "usd_total", "tokens_per_second", "status")}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"against={run} holds no finished run: give the folder of one, with its summary.json") from None


def _holds(interval: dict[str, float], truth: float) -> bool:
    return interval["low"] <= truth <= interval["high"]
