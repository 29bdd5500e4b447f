"""What a sweep may spend in all: how much is left of it, and whether it pays for another run.

What was spent is read from the ledger that all runs share, so a sweep that is started again goes on with the same
budget, and runs that failed or were killed have cost what they cost. Runs are not told of it: a budget of their own
would be a limit they anneal to, and what they learn would depend on what others had spent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from moe_train.config import CostConfig
from moe_train.cost.attempt import RUNNING, Attempt
from moe_train.cost.shared_ledger import read_ledger
from moe_train.errors import UserError

GRACE_SECONDS = 5.0  # from a signal to the end of a job: a step, a checkpoint and the tracker


@dataclass(frozen=True)
class Budget:
    """`usd` for all runs of `sweep` in the ledger at `ledger`; None: no limit."""

    sweep: str
    ledger: Path | None
    usd: float | None
    earlier: tuple[Attempt, ...] = ()  # known from the runs themselves, whatever the ledger was and what it called them

    @classmethod
    def of(cls, sweep: str, ledger: str | None, usd: float | None, earlier: Iterable[Attempt] = ()) -> Budget:
        """Raises UserError where there would be no account to keep it with."""
        if usd is not None and ledger is None:
            raise UserError(f"budget.usd={usd:g} is kept with the ledger: leave cost.ledger at a file")
        return cls(sweep, None if ledger is None else Path(ledger), usd, tuple(earlier))

    def attempts(self) -> list[Attempt]:
        found = {attempt.id: attempt for attempt in self.earlier}
        if self.ledger is not None and self.ledger.exists():
            found |= {each.id: each for each in read_ledger(self.ledger)[0] if each.sweep == self.sweep}
        return list(found.values())

    def spent(self) -> float:
        """Dollars of all attempts so far. UserError where one has no price."""
        return _dollars(self.attempts())

    def expected(self, stop_usd: float | None = None) -> float:
        """What a run will cost: its own stop.usd, else as much as the dearest so far; 0 before the first.

        One that the budget ended counts as well: it would have cost more.
        """
        return _expected(self.attempts(), stop_usd)

    def refusal(self, stop_usd: float | None = None, running: int = 0) -> str | None:
        """Why a run is not to be started now, or None; each of those `running` is expected to cost as much again."""
        if self.usd is None:
            return None
        attempts = self.attempts()
        needed = _expected(attempts, stop_usd)
        left = self.usd - _dollars(attempts) - needed * running
        if left > 0 and left >= needed:
            return None
        return f"budget.usd={self.usd:g} has ${max(left, 0):.3g} left, and the next run needs about ${needed:.3g}"

    def is_used_up(self, running: int) -> bool:
        """Whether what runs has to end now for the sum to stay within the budget."""
        if self.usd is None:
            return False
        attempts = self.attempts()
        seconds = sum(attempt.wall_seconds for attempt in attempts)
        spent = _dollars(attempts)
        rate = spent / seconds if seconds else 0.0
        return spent + rate * GRACE_SECONDS * running >= self.usd


def _dollars(attempts: list[Attempt]) -> float:
    if any(attempt.usd is None for attempt in attempts):
        raise UserError("budget.usd needs a price: give hardware.price_usd_per_hour=…")
    return sum(attempt.usd or 0.0 for attempt in attempts)


def _expected(attempts: list[Attempt], stop_usd: float | None) -> float:
    if stop_usd is not None:
        return stop_usd
    runs: dict[str, float] = {}
    for attempt in attempts:
        runs[attempt.run or attempt.id] = runs.get(attempt.run or attempt.id, 0.0) + (attempt.usd or 0.0)
    running = {attempt.run or attempt.id for attempt in attempts if attempt.status == RUNNING}
    return max((usd for run, usd in runs.items() if run not in running), default=0.0)


def spent_by_others(cost: CostConfig, run: str) -> float | None:
    """By all runs of the sweep but `run`; None without a sweep or ledger, or where one of them has no price."""
    if cost.sweep is None or cost.ledger is None:
        return None
    attempts = Budget(cost.sweep, Path(cost.ledger), None).attempts()
    amounts = [attempt.usd for attempt in attempts if attempt.run != run]
    known = [usd for usd in amounts if usd is not None]
    return sum(known) if len(known) == len(amounts) else None
