"""The bill of many runs, with what they were for kept apart: the honest answer to "$5.6M".

DeepSeek-V3's figure is the rental price of its final run and says itself that it leaves out "prior research and
ablation experiments" (arXiv 2412.19437, section 1). So every dollar of a ledger stands in exactly one column: final
run, tuning, seeds, runs without a stated purpose, runs that never finished, and work done again after a crash. Beside
that, each dollar is rent, wear of owned devices, or energy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from moe_train.cost.attempt import FINISHED, RUNNING, Attempt
from moe_train.errors import UserError

By = Literal["project", "sweep", "claim", "day", "run", "hardware"]
KINDS = ("final", "tuning", "seed", "other", "unfinished", "lost")


@dataclass
class Row:
    """One group of attempts. `usd` by kind adds up to `usd_total`; so do rent, ownership and energy."""

    group: str
    runs: int = 0
    attempts: int = 0
    attempts_by_status: dict[str, int] = field(default_factory=dict)
    unpriced_attempts: int = 0  # their hours are in device_hours, their dollars nowhere
    device_hours: float = 0.0
    energy_kwh: float | None = None  # of the attempts that know it
    usd: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    usd_total: float = 0.0
    usd_rent: float = 0.0
    usd_ownership: float = 0.0
    usd_energy: float = 0.0


@dataclass(frozen=True)
class Bill:
    rows: list[Row]
    total: Row

    def as_dict(self) -> dict[str, Any]:
        return {"rows": [asdict(row) for row in self.rows], "total": asdict(self.total)}


def make_bill(attempts: Iterable[Attempt], by: By, final: Path | None = None) -> Bill:
    """Sum the attempts by group; `final` names the folder of the run that is the final one, whatever its purpose says.

    Raises UserError where `final` is not among them.
    """
    listed = sorted(attempts, key=lambda attempt: attempt.started_at)
    last_status = {_run(attempt): attempt.status for attempt in listed}
    if final is not None and str(final.absolute()) not in last_status:
        raise UserError(f"final={final} is in no line of the ledger: give the folder of a run, as by=run lists them")
    chosen = None if final is None else str(final.absolute())
    groups: dict[str, list[Attempt]] = {}
    for attempt in listed:
        groups.setdefault(_GROUP[by](attempt), []).append(attempt)
    rows = [_row(group, members, last_status, chosen) for group, members in sorted(groups.items())]
    return Bill(rows, _row("total", listed, last_status, chosen))


_GROUP: dict[By, Callable[[Attempt], str]] = {
    "project": lambda attempt: attempt.project or "none",
    "sweep": lambda attempt: attempt.sweep or "none",
    "claim": lambda attempt: attempt.claim or "none",
    "hardware": lambda attempt: attempt.hardware or "unknown",
    "day": lambda attempt: attempt.started_at[:10],  # UTC
    "run": lambda attempt: _run(attempt),
}


def _run(attempt: Attempt) -> str:
    return attempt.run or attempt.id


def _kind(attempt: Attempt, last_status: dict[str, str], final: str | None) -> str:
    """What an attempt was for. One of a run that has not come to its end was for nothing, so far."""
    if last_status[_run(attempt)] not in (FINISHED, RUNNING):
        return "unfinished"
    if final is not None:
        purpose = "final" if _run(attempt) == final else attempt.purpose
        return "other" if purpose is None or (purpose == "final" and _run(attempt) != final) else purpose
    return attempt.purpose or "other"


def _row(group: str, attempts: list[Attempt], last_status: dict[str, str], final: str | None) -> Row:
    row = Row(group, runs=len({_run(attempt) for attempt in attempts}), attempts=len(attempts))
    row.attempts_by_status = dict(Counter(attempt.status for attempt in attempts))
    for attempt in attempts:
        row.device_hours += attempt.wall_seconds * attempt.num_devices / 3600
        if attempt.energy_kwh is not None:
            row.energy_kwh = (row.energy_kwh or 0.0) + attempt.energy_kwh
        if attempt.usd is None:
            row.unpriced_attempts += 1
            continue
        kind = _kind(attempt, last_status, final)
        # Done again: what was lost is in an earlier attempt of the same run, and is taken from what it was for.
        lost = 0.0 if kind == "unfinished" else min(attempt.usd_lost, attempt.usd)
        row.usd["lost"] += lost
        row.usd[kind] += attempt.usd - lost
        energy = attempt.usd_energy or 0.0
        row.usd_energy += energy
        if attempt.basis == "owned":
            row.usd_ownership += attempt.usd - energy
        else:
            row.usd_rent += attempt.usd - energy
    row.usd_total = sum(row.usd.values())
    return row
