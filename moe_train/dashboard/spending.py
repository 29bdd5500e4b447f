"""The ledger as the page shows it: totals by sweep, and dollars adding up over time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_train.cost.attempt import Attempt
from moe_train.cost.bill import KINDS, make_bill
from moe_train.cost.shared_ledger import read_ledger
from moe_train.dashboard.curves import MAX_POINTS, evenly
from moe_train.errors import UserError

MAX_SWEEPS = 10  # lines that can be told apart; what the others spent is one more


def spending(ledger: Path, of_runs: Iterable[Attempt]) -> dict[str, Any]:
    """Totals are those of `scripts/ledger.py`; without a ledger, of the accounts that the runs keep."""
    notes, found = [], True
    own = {attempt.id: attempt for attempt in of_runs}
    try:
        attempts, unreadable = read_ledger(ledger)
    except UserError as error:
        attempts, unreadable, found = list(own.values()), 0, False
        missing = f"there is no ledger {ledger.name}" if not ledger.exists() else str(error)
        notes.append(f"{missing}: these are the accounts of the runs shown, without runs whose folder is gone")
    else:
        absent = len(own.keys() - {attempt.id for attempt in attempts})
        if absent:
            notes.append(f"{absent} attempts of the runs shown are not in this ledger, and not in its totals")
    if unreadable:
        notes.append(f"{unreadable} lines of the ledger cannot be read and are left out")
    bill = make_bill(attempts, "sweep")
    if bill.total.unpriced_attempts:
        notes.append(f"{bill.total.unpriced_attempts} attempts had no price: their hours count, their cost does not")
    rows = [
        {
            "group": "no sweep" if row.group == "none" else row.group,
            "runs": row.runs,
            "attempts": row.attempts,
            "device_hours": row.device_hours,
            "usd": {kind: row.usd[kind] for kind in KINDS},
            "usd_total": row.usd_total,
        }
        for row in [*bill.rows, bill.total]
    ]
    return {
        "ledger": found,
        "rows": rows,
        "energy_kwh": bill.total.energy_kwh,
        "lines": _lines(attempts),
        "notes": notes,
    }


def _lines(attempts: Iterable[Attempt]) -> list[dict[str, Any]]:
    """Dollars of each sweep after the end of each of its attempts, the dearest sweeps first."""
    groups: dict[str, list[Attempt]] = {}
    for attempt in sorted(attempts, key=lambda each: each.updated_at):
        if attempt.usd is not None:
            groups.setdefault(attempt.sweep or "no sweep", []).append(attempt)
    ranked = sorted(groups.items(), key=lambda item: -sum(each.usd or 0.0 for each in item[1]))
    if len(ranked) > MAX_SWEEPS:
        rest = sorted((each for _, group in ranked[MAX_SWEEPS:] for each in group), key=lambda each: each.updated_at)
        ranked = [*ranked[:MAX_SWEEPS], (f"{len(ranked) - MAX_SWEEPS} more sweeps", rest)]
    lines = []
    for sweep, group in ranked:
        at, usd, total = [group[0].started_at], [0.0], 0.0
        for attempt in group:
            total += attempt.usd or 0.0
            at.append(attempt.updated_at)
            usd.append(total)
        kept = evenly(len(at), MAX_POINTS)
        lines.append({"sweep": sweep, "at": [at[i] for i in kept], "usd": [usd[i] for i in kept]})
    return lines
