"""What the page holds of one run: its figures, its thinned curves, the load of its experts by layer."""

from __future__ import annotations

import re
from typing import Any

from moe_train.cost.value import bits_per_byte_per_usd
from moe_train.dashboard.curves import LOAD_POINTS, evenly, short, thinned
from moe_train.dashboard.runs import Number, Run, number, value

Entry = dict[str, Any]

AXES = {  # of the charts -> the metric
    "usd": "cost/usd_total",
    "tokens": "progress/tokens",
    "flops": "progress/flops",
    "seconds": "progress/seconds",
    "steps": "step",
}
CURVES = {"train_loss": "train/loss", "val_loss": "val/loss", "val_bits_per_byte": "val/bits_per_byte"}
LOADS = ("max_violation", "load_entropy", "dead_experts")

# The name in the entry -> the summary's, and the metric that has it while there is no summary.
_FIGURES = {
    "val_bits_per_byte": ("val_bits_per_byte", "val/bits_per_byte"),
    "val_loss": ("val_loss", "val/loss"),
    "train_loss": ("final_train_loss", "train/loss"),
    "tokens": ("tokens", "progress/tokens"),
    "steps": ("steps", "step"),
    "seconds": ("wall_seconds", "progress/seconds"),
    "train_seconds": ("train_seconds", None),
    "usd": ("usd_total", "cost/usd_total"),
    "usd_train": ("usd_train", "cost/usd_train"),
    "usd_per_million_tokens": ("usd_per_million_tokens", "cost/usd_per_million_tokens"),
    "usd_per_million_tokens_all_in": ("usd_per_million_tokens_all_in", None),
    "tokens_per_second": ("tokens_per_second", "throughput/tokens_per_second"),
    "mfu": ("model_flops_utilization", "throughput/model_flops_utilization"),
    "exposed_communication": ("communication_exposed_fraction", "comm/exposed_fraction"),
    "energy_kwh": ("energy_kwh", "cost/energy_kwh"),
    "total_params": ("total_params", None),
    "active_params": ("active_params", None),
    "price_usd_per_hour": ("price_usd_per_hour", None),
    "num_devices": ("num_devices", None),
}


def entry(run: Run, most: int) -> Entry:
    """Curves have at most `most` points."""
    figures: dict[str, Number | None] = {
        name: run.figure(summary_key, metric) for name, (summary_key, metric) in _FIGURES.items()
    }
    figures["flops"] = run.last("progress/flops")
    if figures["flops"] is None:
        figures["flops"] = _product(figures["tokens"], run.figure("flops_per_token"))
    saved = number(bits_per_byte_per_usd(figures["val_bits_per_byte"], figures["usd"]))
    notes = list(run.notes)
    if not run.summary:
        notes.append("figures are those of the last logged step")
    if figures["usd"] is None:
        notes.append("no price: no dollars")
    return {
        "name": str(run.settings.get("name") or run.folder.name),
        "status": run.status,
        "precision": run.precision,
        "experts": run.num_experts,
        "hardware": _hardware(run),
        "figures": figures | {"bits_per_byte_a_dollar": saved},
        "curves": {name: curve for name, metric in CURVES.items() if (curve := _curve(run, metric, most))},
        "load": _load(run, most // LOAD_POINTS),
        "notes": notes,
    }


def _product(a: Number | None, b: Number | None) -> Number | None:
    return None if a is None or b is None else number(a * b)


def _hardware(run: Run) -> str | None:
    """What dollars and seconds depend on: as far as the summary, or else the account, says it."""
    name = run.summary.get("hardware") or next((a.hardware for a in reversed(run.attempts) if a.hardware), None)
    devices = run.figure("num_devices") or next((a.num_devices for a in reversed(run.attempts)), None)
    if name is None:
        return None
    cores = run.figure("num_threads") if name == "cpu" else None
    if cores is None and name == "cpu" and isinstance(run.settings.get("num_threads"), int):
        cores = run.settings["num_threads"]
    times = f"{devices} × " if devices and devices > 1 else ""
    return f"{times}{name}" + (f", {cores:g} core{'s' if cores != 1 else ''}" if cores else "")


def _curve(run: Run, metric: str, most: int) -> dict[str, list[Number | None]] | None:
    rows = [row for row in run.rows if value(row, metric) is not None]
    if not rows:
        return None
    kept = [rows[index] for index in thinned([row[metric] for row in rows], most)]
    curve = {name: [short(value(row, axis)) for row in kept] for name, axis in AXES.items()}
    known = {name: values for name, values in curve.items() if any(each is not None for each in values)}
    return known | {"y": [short(row[metric]) for row in kept]}


def _load(run: Run, most: int) -> dict[str, Any] | None:
    """For each statistic of every layer with experts, its values over time: layers × moments, the last one now."""
    named = (re.match(r"moe/layer_(\d+)/", name) for row in run.rows[-1:] for name in row)
    layers = sorted({int(match[1]) for match in named if match})
    if not layers:
        return None
    rows = [row for row in run.rows if f"moe/layer_{layers[0]}/{LOADS[0]}" in row]
    kept = [rows[index] for index in evenly(len(rows), most)]
    return {
        "layers": layers,
        "tokens": [short(value(row, "progress/tokens")) for row in kept],
        "steps": [short(row["step"]) for row in kept],
        "over_time": {
            name: [[short(value(row, f"moe/layer_{layer}/{name}")) for row in kept] for layer in layers]
            for name in LOADS
        },
    }
