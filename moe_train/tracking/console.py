"""What a person is told: notes along the way, and one closing table of what the run came to.

A figure that is not known says so and says why; none is left out.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text


@functools.cache
def stderr_console() -> Console:
    """The one console for what is said along the way: a live panel makes room only for what goes through its own."""
    return Console(stderr=True)


def print_notes(notes: Iterable[str], console: Console | None = None) -> None:
    """What the user should know about how this run is done and counted, one line each, on stderr by default."""
    console = console or stderr_console()
    for note in notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)


def closing_table(summary: dict[str, Any]) -> Table:
    """The figures of `summary`, the content of summary.json."""
    table = Table(
        title=f"{summary['status']} after {summary['steps']:,} steps", show_header=False, title_justify="left"
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, value: str) -> None:
        table.add_row(name, Text(value))

    row("train loss", _known(summary["final_train_loss"], "{:.4f}"))
    row("validation loss", _known(summary["val_loss"], "{:.4f}"))
    row("bits per byte", _known(summary["val_bits_per_byte"], "{:.4f}"))
    if summary["val_mtp_loss"] is not None:
        row("validation loss of MTP", f"{summary['val_mtp_loss']:.4f}")
    if summary["final_max_violation"] is not None:
        dropped = summary["final_dropped_fraction"]
        row(
            "expert load",
            f"the fullest expert {1 + summary['final_max_violation']:.2f} times the mean"
            + ("" if dropped is None else f", {dropped:.1%} dropped"),
        )
    row("tokens", f"{summary['tokens']:,}")
    row("tokens/s", _known(summary["tokens_per_second"], "{:,.0f}"))
    utilization = summary["model_flops_utilization"]
    row(
        "model FLOPs utilisation",
        "not known: no peak rate for this hardware"
        if utilization is None
        else f"{utilization:.1%} of the peak ({summary['peak_source']})",
    )
    row("time", f"{as_duration(summary['train_seconds'])} training, {as_duration(summary['wall_seconds'])} in all")
    if summary["price_usd_per_hour"] is None:
        unpriced = "not known: give hardware.price_usd_per_hour=…"
        row("cost", unpriced)
        row("cost per million tokens", unpriced)
    else:
        hourly, devices = summary["price_usd_per_hour"], str(summary["num_devices"])
        if summary["hardware"] == "cpu":  # priced a core
            hourly, devices = hourly / summary["num_threads"], f"{devices} × {summary['num_threads']} cores"
        price = f"{devices} × {as_usd(hourly)} an hour, {summary['price_source']}, {summary['price_date'] or 'undated'}"
        if summary["cost_basis"] == "owned":
            price += f"; energy at {as_usd(summary['usd_per_kwh'])} a kWh"
        row("cost", f"{_known_usd(summary['usd_train'])} training, {_known_usd(summary['usd_total'])} in all ({price})")
        row(
            "cost per million tokens",
            f"{_known_usd(summary['usd_per_million_tokens'])} training, "
            f"{_known_usd(summary['usd_per_million_tokens_all_in'])} all-in",
        )
    if summary.get("communication_bytes_per_step") is not None:  # older runs have none
        row("communication", _communication(summary))
    energy = _known(summary["energy_kwh"], "{:.4g} kWh", "not known: no energy counter could be read")
    row("energy", energy + (f" ({summary['energy_source']})" if summary["energy_kwh"] is not None else ""))
    return table


def _communication(summary: dict[str, Any]) -> str:
    """Of several processes: how much, what for, and the price of waiting for it."""
    by_kind = summary["communication_by_kind"] or {}
    kinds = sorted(by_kind, key=lambda kind: -by_kind[kind]["bytes"])
    parts = ", ".join(f"{kind.replace('_', ' ')} {as_bytes(by_kind[kind]['bytes'])}" for kind in kinds)
    waited = _known(summary["communication_exposed_fraction"], "{:.1%}", "an unknown part")
    text = f"{as_bytes(summary['communication_bytes_per_step'])} sent a step and process ({parts}), waited for {waited}"
    usd = summary["usd_communication"]
    return f"{text} of a step" + ("" if usd is None else f": {as_usd(usd)}")


def as_bytes(value: float) -> str:
    """Three significant digits, in powers of a thousand."""
    power = next((n for n in range(4) if value < 999.5 * 1000**n), 4)
    return f"{value / 1000**power:.3g} {('B', 'KB', 'MB', 'GB', 'TB')[power]}"


def where_to_look(run_folder: Path, wandb_location: str | None) -> list[str]:
    """Where the run lies and the commands that show it: lines of their own, which can be copied whole."""
    lines = [f"run folder  {run_folder}"]
    if wandb_location is None:
        return lines
    if wandb_location.startswith(("http://", "https://")):
        return [*lines, f"wandb       {wandb_location}"]
    view, upload = f"wandb leet {shlex.quote(wandb_location)}", sync_command(wandb_location)
    return [*lines, f"view        {view}", f"upload      {upload}"]


def sync_command(wandb_folder: str) -> str:
    """What sends a run later. wandb takes one that began online for sent unless it is told otherwise."""
    began_online = not Path(wandb_folder).name.startswith("offline-")
    return f"wandb sync {'--no-skip-online ' if began_online else ''}{shlex.quote(wandb_folder)}"


def _known(value: float | None, form: str, otherwise: str = "not known") -> str:
    return otherwise if value is None else form.format(value)


def _known_usd(value: float | None) -> str:
    return "not known" if value is None else as_usd(value)


def as_usd(value: float) -> str:
    """Cents from a dollar up, three significant digits below: a CPU's run costs thousandths."""
    if value >= 1:
        return f"${value:,.2f}"
    return f"${np.format_float_positional(value, precision=3, fractional=False, trim='-')}"


def as_duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
