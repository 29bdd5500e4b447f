"""What a sweep may spend in all: how much is left of it, and whether it pays for another run.

What was spent is read from the ledger that all runs share, so a sweep that is started again goes on with the same
budget, and runs that failed or were killed have cost what they cost. Each run is also given what is left as its own
`budget.usd`, so that the first one, whose cost nobody knows, cannot spend more than all.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.config import CostConfig
from moe_train.cost.attempt import RUNNING, Attempt
from moe_train.cost.shared_ledger import read_ledger
from moe_train.errors import UserError

_STOP_USD = re.compile(r"\+*stop\.usd=(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)")


@dataclass(frozen=True)
class Budget:
    """`usd` for all runs of `sweep` in the ledger at `ledger`; None: no limit."""

    sweep: str
    ledger: Path | None
    usd: float | None

    @classmethod
    def of_a_grid(cls, cost: Mapping[str, Any], budget: Mapping[str, Any]) -> Budget:
        """From the settings `cost` and `budget` of a grid; one without a name is named by the time. UserError."""
        named, ledger, usd = cost["sweep"], cost["ledger"], budget["usd"]
        if usd is not None and not (isinstance(usd, int | float) and usd > 0):
            raise UserError(f"budget.usd={usd}: give dollars above 0")
        if usd is not None and ledger is None:
            raise UserError(f"budget.usd={usd} of a grid is kept with the ledger: leave cost.ledger at a file")
        now = datetime.datetime.now().strftime("grid-%Y-%m-%d-%H-%M-%S")
        return cls(str(named or now), None if ledger is None else Path(ledger), usd)

    def overrides(self) -> list[str]:
        """What a run of the sweep is started with."""
        quoted = self.sweep.replace("\\", "\\\\").replace("'", "\\'")  # for hydra's grammar
        own = [f"cost.sweep='{quoted}'"]
        return own if self.usd is None else [*own, f"budget.usd={self.usd - self.spent():.12g}"]

    def attempts(self) -> list[Attempt]:
        if self.ledger is None or not self.ledger.exists():
            return []
        return [attempt for attempt in read_ledger(self.ledger)[0] if attempt.sweep == self.sweep]

    def spent(self) -> float:
        """Dollars of all attempts so far. UserError where one has no price."""
        attempts = self.attempts()
        if any(attempt.usd is None for attempt in attempts):
            raise UserError("budget.usd needs a price: give hardware.price_usd_per_hour=…")
        return sum(attempt.usd or 0.0 for attempt in attempts)

    def expected(self, overrides: Sequence[str]) -> float:
        """What a run will cost: its own stop.usd, else as much as the dearest so far; 0 before the first.

        One that the budget ended counts as well: it would have cost more.
        """
        own = [found[1] for override in overrides if (found := _STOP_USD.fullmatch(override))]
        if own:
            return float(own[-1])
        runs: dict[str, float] = {}
        for attempt in (attempts := self.attempts()):
            runs[attempt.run or attempt.id] = runs.get(attempt.run or attempt.id, 0.0) + (attempt.usd or 0.0)
        running = {attempt.run or attempt.id for attempt in attempts if attempt.status == RUNNING}
        return max((usd for run, usd in runs.items() if run not in running), default=0.0)

    def refusal(self, overrides: Sequence[str]) -> str | None:
        """Why a run with these overrides is not to be started, or None."""
        if self.usd is None:
            return None
        left, needed = self.usd - self.spent(), self.expected(overrides)
        if left > 0 and left >= needed:
            return None
        return f"budget.usd={self.usd:g} has ${max(left, 0):.3g} left, and the next job needs about ${needed:.3g}"


def spent_by_others(cost: CostConfig, run: str) -> float | None:
    """By all runs of the sweep but `run`; None without a sweep or ledger, or where one of them has no price."""
    if cost.sweep is None or cost.ledger is None:
        return None
    attempts = Budget(cost.sweep, Path(cost.ledger), None).attempts()
    amounts = [attempt.usd for attempt in attempts if attempt.run != run]
    known = [usd for usd in amounts if usd is not None]
    return sum(known) if len(known) == len(amounts) else None
