"""Figures as tables in the terminal, each suite's as soon as it is measured."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from itertools import groupby

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_train.benchmark.ceilings import Ceilings
from moe_train.benchmark.figures import Figure, doubts
from moe_train.benchmark.keeping import AGAIN
from moe_train.benchmark.results import cpu_kernels
from moe_train.training.runtime import Runtime

_FORMS = {
    "tokens/s": "{:,.0f}",
    "ratio": "{:.3f}",
    "s": "{:.2f} s",
    "count": "{:.0f}",
    "TFLOP/s": "{:.4g} TFLOP/s",
    "GB/s": "{:.4g} GB/s",
}


def shown(value: float, unit: str) -> str:
    if unit == "share":
        return f"{100 * value:.3g}%"  # an overhead of hundredths of a percent is a figure too
    return f"{value / 1e6:,.1f} MB" if unit == "bytes" else _FORMS[unit].format(value)


def device_line(runtime: Runtime) -> str:
    """Whose figures these are."""
    return f"{runtime.device_name}, {runtime.num_threads} thread{'' if runtime.num_threads == 1 else 's'}"


def show_device(runtime: Runtime, ceilings: Ceilings, load: float | None) -> None:
    """What everything else is held against. `load`: see results.py."""
    kernels, reason = cpu_kernels(runtime)
    by = {"compiled": ", kernels in C", "torch": ", torch's kernels", None: ""}[kernels]
    table = _table(f"{device_line(runtime)}{by}, torch {torch.__version__}, {date.today()}", "at its best")
    rows = [(f"{ceilings.dtype} product, large and square", ceilings.matmul, "TFLOP/s")]
    rows += [(f"{ceilings.dtype} product, {sizes}", rate, "TFLOP/s") for sizes, rate in ceilings.products.items()]
    rows.append(("copy, bytes read and written", ceilings.copy, "GB/s"))
    for name, rate, unit in rows:
        table.add_row(name, shown(rate.value, unit), f"{shown(rate.low, unit)} to {shown(rate.high, unit)}")
    console = Console()
    console.print(table)
    if reason is not None:
        console.print(Text(f"note: torch's kernels, not ours in C: {reason}"), soft_wrap=True)
    if load is not None and load > 0.5:
        # The system's mean of a minute: what a command before this one did is still in it.
        note = f"note: {load:.1f} processes wanted a core in the minute before: with others at work, "
        console.print(Text(f"{note}figures are rough, ratios less so"), soft_wrap=True)


def show(figures: Sequence[Figure]) -> None:
    """A table for each thing measured, and below it what there is to say."""
    console = Console()
    for (suite, of), group in groupby(figures, key=lambda figure: (figure.suite, figure.of)):
        table = _table(f"suite={suite}" + (f": {of}" if of else ""), "figure")
        notes = []
        for figure in group:
            name = figure.name.replace("_", " ")
            between = "" if figure.spread is None else " to ".join(shown(each, figure.unit) for each in figure.spread)
            value = "not measured" if figure.value is None else shown(figure.value, figure.unit)
            table.add_row(name, value, between + ("" if figure.unsteady is None else ", unsteady"))
            if figure.note is not None:
                notes.append(f"{name}: {figure.note}")
        console.print(table)
        for note in notes:
            console.print(Text(f"  {note}"), soft_wrap=True)


def show_doubts(figures: Sequence[Figure]) -> None:
    """Of each suite with figures that are not to be trusted, in a line, why and what to do."""
    unsteady = [figure for figure in figures if figure.unsteady is not None]
    for suite, group in groupby(unsteady, key=lambda figure: figure.suite):
        line = f"note: suite={suite}: figures marked as unsteady say little ({doubts(list(group))}): {AGAIN}"
        Console().print(Text(line), soft_wrap=True)


def _table(title: str, first: str) -> Table:
    table = Table(title=Text(title), title_justify="left")  # settings have brackets, too
    table.add_column(first, overflow="fold")
    for column in ("median", "quartiles"):
        table.add_column(column, justify="right")
    return table
