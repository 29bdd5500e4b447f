"""A comparison of two runs as tables in the terminal."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_train.tracking.console import as_usd

_TITLES = {
    "val_bits_per_byte": "bits per byte",
    "val_loss": "validation loss",
    "train_loss": "training loss",
    "tokens": "tokens",
    "flops": "FLOPs",
    "seconds": "seconds in all",
    "train_seconds": "seconds of training",
    "usd": "dollars in all",
    "usd_train": "dollars of training",
    "usd_per_million_tokens": "dollars per million tokens",
    "tokens_per_second": "tokens/s",
    "energy_kwh": "energy, kWh",
}
_MEASURES = {"val/bits_per_byte": "bits per byte", "train/loss": "a training loss of"}


def show(content: dict[str, Any], console: Console | None = None) -> None:
    """Settings, figures, and what each run took to come as far as the worse one; on stdout by default."""
    console = console or Console()
    for which in ("a", "b"):
        run = content[which]
        remarks = "; ".join([run["status"], run["hardware"] or "hardware not known", *run["notes"]])
        console.print(Text(f"{which.upper()}  {run['folder']} ({remarks})"), soft_wrap=True)
    if content["settings"]:
        table = _table("settings that differ", "setting", ratio=False)
        for each in content["settings"]:
            cells = ("–" if each["only_in"] not in (None, which) else _plain(each[which]) for which in ("a", "b"))
            table.add_row(Text(each["key"]), *(Text(cell) for cell in cells))
        console.print(table)
    else:
        console.print("no setting differs")
    marks: dict[str, str] = {}
    table = _table("results", "")
    for each in content["figures"]:
        _add(table, each["name"], _TITLES[each["name"]], each, marks)
    console.print(table)
    reached = content["reached"]
    if reached["measure"] is None:
        console.print(Text(f"cost of coming equally far: not known: {reached['axes']['tokens']['reason']}"))
    else:
        target = f"{_MEASURES[reached['measure']]} {reached['target']:.4f}"
        title = f"to reach {target}, where {reached['worse'].upper()} ended"
        table = _table(title, "")
        for name, each in reached["axes"].items():
            _add(table, name, _TITLES[name], each, marks)
        console.print(table)
    for text, mark in marks.items():
        console.print(Text(f"{mark.strip()} {text}"), soft_wrap=True)
    for text in content["notes"]:
        if text not in marks:
            console.print(Text(f"note: {text}"), soft_wrap=True)


def _table(title: str, first: str, ratio: bool = True) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, overflow="fold")
    for name in ("A", "B", "B / A") if ratio else ("A", "B"):
        table.add_column(name, justify="right", overflow="fold")
    return table


def _add(table: Table, name: str, title: str, figure: dict[str, Any], marks: dict[str, str]) -> None:
    """A row; what does not compare, or is not known, gets a mark that stands for its explanation below."""
    ratio = "–" if figure["ratio"] is None else f"{figure['ratio']:.3g}×"
    for text in (figure["note"], figure.get("reason")):
        if text is not None:
            ratio += marks.setdefault(text, f" [{len(marks) + 1}]")
    table.add_row(title, _figure(name, figure["a"]), _figure(name, figure["b"]), Text(ratio))


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name.startswith("usd"):
        return as_usd(value)
    if name == "flops":
        return f"{value:.3e}"
    return f"{value:,.4f}" if abs(value) < 100 else f"{value:,.0f}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
