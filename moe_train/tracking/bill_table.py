"""A bill as a table in the terminal, with what it does not know said below."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_train.cost.bill import KINDS, Bill, Row
from moe_train.tracking.console import as_usd

_TITLE = "dollars by what they were spent on"
_TITLES: dict[str, str] = {
    "final": "final run",
    "tuning": "tuning",
    "seed": "seeds",
    "other": "no purpose stated",
    "unfinished": "never finished",
    "lost": "done again",
}


def show(bill: Bill, by: str, unreadable_lines: int, console: Console | None = None) -> None:
    """The bill on stdout. Columns without a dollar anywhere are left out, and no dollar is cut."""
    console = console or Console()
    kinds = [kind for kind in KINDS if bill.total.usd[kind] > 0]
    table = _side_by_side(bill, by, kinds)
    if console.measure(table, options=console.options.update(width=1_000)).maximum > console.width:
        table = _below_each_other(bill, by, kinds)
    console.print(table)
    total = bill.total
    parts = {"rent": total.usd_rent, "ownership": total.usd_ownership, "energy": total.usd_energy}
    console.print(
        Text("of which " + ", ".join(f"{as_usd(amount)} {name}" for name, amount in parts.items())), soft_wrap=True
    )
    statuses = ", ".join(f"{count} {status}" for status, count in sorted(total.attempts_by_status.items()))
    console.print(Text(f"attempts: {statuses}" if statuses else "no attempts"), soft_wrap=True)
    energy = "not measured" if total.energy_kwh is None else f"{total.energy_kwh:.4g} kWh where it was measured"
    console.print(Text(f"energy: {energy}"), soft_wrap=True)
    if total.unpriced_attempts:
        console.print(Text(f"note: {total.unpriced_attempts} attempts had no price: their hours count, their cost not"))
    if unreadable_lines:
        console.print(Text(f"note: {unreadable_lines} lines cannot be read (a write cut short) and are left out"))


def _side_by_side(bill: Bill, by: str, kinds: list[str]) -> Table:
    table = Table(title=_TITLE, title_justify="left")
    table.add_column(by, overflow="fold")
    for title in ("runs", "attempts", "device hours", *(_TITLES[kind] for kind in kinds), "total"):
        table.add_column(title, justify="right")
    for row in _rows(bill):
        if row is bill.total:
            table.add_section()
        table.add_row(
            _name(row),
            str(row.runs),
            str(row.attempts),
            f"{row.device_hours:,.3f}",
            *(as_usd(row.usd[kind]) for kind in kinds),
            as_usd(row.usd_total),
        )
    return table


def _below_each_other(bill: Bill, by: str, kinds: list[str]) -> Table:
    """The same where there is no room: a line for each kind."""
    table = Table(title=_TITLE, title_justify="left")
    table.add_column(by, overflow="fold")
    table.add_column("spent on")
    table.add_column("dollars", justify="right", no_wrap=True)
    for row in _rows(bill):
        table.add_section()
        counted = f"{row.runs} runs, {row.attempts} attempts, " if row.attempts > 1 else ""
        table.add_row(_name(row), f"{counted}{row.device_hours:,.3f} device hours", as_usd(row.usd_total))
        for kind in kinds:
            if row.usd[kind] > 0:
                table.add_row("", f"  {_TITLES[kind]}", as_usd(row.usd[kind]))
    return table


def _rows(bill: Bill) -> list[Row]:
    return [*bill.rows, bill.total] if len(bill.rows) != 1 else list(bill.rows)


def _name(row: Row) -> Text:
    """Runs by their folders, from where one is if they lie there."""
    folder = Path(row.group)
    inside = folder.is_absolute() and folder.is_relative_to(Path.cwd())
    return Text(str(folder.relative_to(Path.cwd())) if inside else row.group)
