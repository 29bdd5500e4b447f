"""A bill as a table in the terminal, with what it does not know said below."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_train.cost.bill import KINDS, Bill, Row
from moe_train.tracking.console import as_usd

_TITLES = {
    "final": "final run",
    "tuning": "tuning",
    "seed": "seeds",
    "other": "no purpose stated",
    "unfinished": "never finished",
    "lost": "done again",
}


def show(bill: Bill, by: str, unreadable_lines: int, console: Console | None = None) -> None:
    """The bill on stdout. Columns without a dollar anywhere are left out."""
    console = console or Console()
    kinds = [kind for kind in KINDS if bill.total.usd[kind] > 0]
    table = Table(title="dollars by what they were spent on", title_justify="left")
    table.add_column(by, overflow="fold")
    for title in ("runs", "attempts", "device hours", *(_TITLES[kind] for kind in kinds), "total"):
        table.add_column(title, justify="right")

    def add(row: Row) -> None:
        table.add_row(
            Text(row.group),
            str(row.runs),
            str(row.attempts),
            f"{row.device_hours:,.3f}",
            *(as_usd(row.usd[kind]) for kind in kinds),
            as_usd(row.usd_total),
        )

    for row in bill.rows:
        add(row)
    if len(bill.rows) != 1:
        table.add_section()
        add(bill.total)
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
