"""When a run ends, and how far it has come: the first limit reached ends it, and it drives the learning rate till then.

Seconds and dollars cover the whole process, so what must still happen after the last step (the closing evaluation and
checkpoint) is kept in reserve: the run stops early enough for its total to stay within the limit.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config import StopConfig
from moe_train.errors import UserError


@dataclass(frozen=True)
class Spent:
    """What a run has used so far, earlier attempts included. `usd` is None where no price is known."""

    steps: int
    tokens: int
    flops: float
    seconds: float  # wall clock of the process
    usd: float | None  # of all devices
    reserve_seconds: float = 0.0  # wall clock that the end of the run is expected to take
    reserve_usd: float = 0.0  # and what that will cost


_CLOCKS = ("stop.seconds", "stop.usd", "budget.usd")


class Limits:
    """The limits of `stop` and `budget_usd`; `priced` says whether dollars are known, `remedy` what would make them.

    Raises UserError where a limit in dollars is asked for without a price to measure it by.
    """

    def __init__(
        self, stop: StopConfig, budget_usd: float | None, priced: bool, remedy: str = "hardware.price_usd_per_hour=…"
    ) -> None:
        given = {
            "stop.steps": stop.steps,
            "stop.tokens": stop.tokens,
            "stop.flops": stop.flops,
            "stop.seconds": stop.seconds,
            "stop.usd": stop.usd,
        }
        self._limits: dict[str, float] = {name: limit for name, limit in given.items() if limit is not None}
        if not self._limits:
            self._limits = {"stop.default_tokens": stop.default_tokens}
        if budget_usd is not None:
            self._limits["budget.usd"] = budget_usd
        for name in ("stop.usd", "budget.usd"):
            if name in self._limits and not priced:
                raise UserError(
                    f"{name}={self._limits[name]:g} needs a price above zero for this hardware: "
                    f"give {remedy}, or stop by another limit"
                )

    @property
    def uses_clock(self) -> bool:
        """Whether the end depends on time: processes then differ, and rank 0's answer must be taken by all."""
        return not self._limits.keys().isdisjoint(_CLOCKS)

    def progress(self, spent: Spent) -> float:
        """The largest used part of a limit, from 0; a step may start only while this is below 1."""
        return max(self._parts(spent).values())

    def reason(self, spent: Spent) -> str | None:
        """The limit that ends the run, as the key the user gave, or None while none is reached."""
        name, part = max(self._parts(spent).items(), key=lambda item: item[1])
        return f"{name}={self._limits[name]:,}" if part >= 1 else None

    def seconds_left(self, spent: Spent, usd_per_second: float) -> float:
        """Until the nearest limit of seconds or dollars, less the reserve; below 0 beyond it, infinite without one."""
        left = [float("inf")]
        if "stop.seconds" in self._limits:
            left.append(self._limits["stop.seconds"] - spent.seconds - spent.reserve_seconds)
        for name in ("stop.usd", "budget.usd"):
            if name in self._limits and usd_per_second > 0:
                usd = self._limits[name] - (spent.usd or 0.0) - spent.reserve_usd
                left.append(usd / usd_per_second)
        return min(left)

    def _parts(self, spent: Spent) -> dict[str, float]:
        used = {
            "stop.steps": spent.steps,
            "stop.tokens": spent.tokens,
            "stop.default_tokens": spent.tokens,
            "stop.flops": spent.flops,
            "stop.seconds": spent.seconds,
            "stop.usd": spent.usd,
            "budget.usd": spent.usd,
        }
        # The reserve shortens the limit instead of adding to what is used, so that a run begins near progress 0.
        reserve = {
            "stop.seconds": spent.reserve_seconds,
            "stop.usd": spent.reserve_usd,
            "budget.usd": spent.reserve_usd,
        }
        parts = {}
        for name, limit in self._limits.items():
            amount, available = used[name], limit - reserve.get(name, 0.0)
            if amount is None:
                raise ValueError(f"{name} is set but the run does not say what it has spent")
            parts[name] = amount / available if available > 0 else 1.0
        return parts
