"""What a person sees: notes at the start, progress while it runs, and one closing table of what the run came to.

Progress is a bar on a terminal and plain lines elsewhere (a log file, a job's output). A figure that is not known says
so and says why; none is left out.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

_SECONDS_BETWEEN_LINES = 5.0


class TrainingProgress:
    """Context manager that shows how far a run is, on stderr by default; stdout is left to results."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._bar = Progress(
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=1.0)
        self._start: tuple[float, float] | None = None  # time and progress of the first update
        self._last_line = -float("inf")

    def __enter__(self) -> TrainingProgress:
        if not self._bar.disable:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._bar.disable:  # it would print an empty line
            self._bar.stop()

    def update(
        self, fraction: float, *, step: int, loss: float | None, tokens_per_second: float | None, usd: float | None
    ) -> None:
        """Show a logged step at `fraction` (0 to 1) of the run; `usd` is the whole bill so far."""
        now = self._clock()
        if self._start is None:
            self._start = (now, fraction)
        figures = [
            f"step {step:,}",
            "loss not known" if loss is None else f"loss {loss:.4f}",
            "tokens/s not known" if tokens_per_second is None else f"{tokens_per_second:,.0f} tokens/s",
            "cost not known" if usd is None else as_usd(usd),
        ]
        done = fraction - self._start[1]
        if done > 0:
            left = (now - self._start[0]) * max(0.0, 1 - fraction) / done
            figures.append(f"{_duration(left)} left")
        text = "  ".join(figures)
        self._bar.update(self._task, completed=fraction, description=text)
        if self._bar.disable and (now - self._last_line >= _SECONDS_BETWEEN_LINES or fraction >= 1):
            self._last_line = now
            self.message(f"{fraction:4.0%}  {text}")

    def message(self, text: str) -> None:
        """One line, above the bar where there is one."""
        self._console.print(Text(text), soft_wrap=True)


def print_notes(notes: Iterable[str], console: Console | None = None) -> None:
    """What the user should know about how this run is done and counted, one line each, on stderr by default."""
    console = console or Console(stderr=True)
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
    row("time", f"{_duration(summary['train_seconds'])} training, {_duration(summary['wall_seconds'])} in all")
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
    energy = _known(summary["energy_kwh"], "{:.4g} kWh", "not known: no energy counter could be read")
    row("energy", energy + (f" ({summary['energy_source']})" if summary["energy_kwh"] is not None else ""))
    return table


def where_to_look(run_folder: Path, wandb_location: str | None) -> list[str]:
    """Where the run lies and the commands that show it: lines of their own, which can be copied whole."""
    lines = [f"run folder  {run_folder}"]
    if wandb_location is None:
        return lines
    if wandb_location.startswith(("http://", "https://")):
        return [*lines, f"wandb       {wandb_location}"]
    quoted = shlex.quote(wandb_location)
    return [*lines, f"view        wandb leet {quoted}", f"upload      wandb sync {quoted}"]


def _known(value: float | None, form: str, otherwise: str = "not known") -> str:
    return otherwise if value is None else form.format(value)


def _known_usd(value: float | None) -> str:
    return "not known" if value is None else as_usd(value)


def as_usd(value: float) -> str:
    """Cents from a dollar up, three significant digits below: a CPU's run costs thousandths."""
    if value >= 1:
        return f"${value:,.2f}"
    return f"${np.format_float_positional(value, precision=3, fractional=False, trim='-')}"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
