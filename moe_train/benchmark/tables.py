"""Figures as tables in the terminal."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_train.benchmark.results import Content

_FORMS = {
    "tokens/s": "{:,.0f}",
    "share": "{:.1%}",
    "ratio": "{:.3f}",
    "s": "{:.2f} s",
    "count": "{:.0f}",
    "TFLOP/s": "{:.4g} TFLOP/s",
    "GB/s": "{:.4g} GB/s",
}


def shown(value: float, unit: str) -> str:
    return f"{value / 1e6:,.1f} MB" if unit == "bytes" else _FORMS[unit].format(value)


def show(content: Content, console: Console | None = None) -> None:
    """A table for the device and one for each suite, on stdout by default."""
    console = console or Console()
    (made,) = content["runs"]
    console.print(_ceilings(content, made))
    for (suite, of), figures in groupby(content["figures"], key=lambda figure: (figure["suite"], figure["of"])):
        console.print(_group(suite, of, list(figures)))
    load = made["load_before"]
    if load is not None and load > 0.5:
        console.print(
            Text(f"note: {load:.1f} processes wanted a core before the first measurement: with others at work, figures "
                 "are rough, ratios less so"),
            soft_wrap=True,
        )  # fmt: skip


def _ceilings(content: Content, made: dict[str, Any]) -> Table:
    found = made["ceilings"]
    table = Table(title=f"{content['device']}, {content['num_threads']} threads, torch {content['versions']['torch']}, "
                        f"{content['date']}", title_justify="left")  # fmt: skip
    table.add_column("at its best")
    for column in ("median", "quartiles"):
        table.add_column(column, justify="right")
    rows = [(f"{found['dtype']} product, large and square", found["matmul"], "TFLOP/s")]
    rows += [(f"{found['dtype']} product, {sizes}", rate, "TFLOP/s") for sizes, rate in found["products"].items()]
    rows.append(("copy, bytes read and written", found["copy"], "GB/s"))
    for name, (value, low, high, _), unit in rows:
        table.add_row(name, shown(value, unit), f"{shown(low, unit)} to {shown(high, unit)}")
    return table


def _group(suite: str, of: str, figures: list[dict[str, Any]]) -> RenderableType:
    """What was measured of one thing, and below it what there is to say."""
    table = Table(title=f"suite={suite}" + (f": {of}" if of else ""), title_justify="left")
    table.add_column("figure", overflow="fold")
    for column in ("median", "quartiles"):
        table.add_column(column, justify="right")
    notes = []
    for figure in figures:
        spread, value, name = figure["spread"], figure["value"], figure["name"].replace("_", " ")
        between = "" if spread is None else " to ".join(shown(each, figure["unit"]) for each in spread)
        table.add_row(name, "not measured" if value is None else shown(value, figure["unit"]), between)
        if figure["note"] is not None:
            notes.append(Text(f"  {name}: {figure['note']}"))
    return Group(table, *notes)
