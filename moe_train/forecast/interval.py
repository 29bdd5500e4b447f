"""A figure that is not known exactly."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """`low` ≤ `value` ≤ `high`."""

    value: float
    low: float
    high: float

    @classmethod
    def around(cls, value: float, factor: float) -> Interval:
        """From value / factor to value · factor."""
        return cls(value, value / factor, value * factor)

    def __add__(self, other: Interval) -> Interval:
        """Of figures that err together."""
        return Interval(self.value + other.value, self.low + other.low, self.high + other.high)

    def __mul__(self, factor: float) -> Interval:
        return Interval(self.value * factor, self.low * factor, self.high * factor)

    def under(self, amount: float) -> Interval:
        """`amount` divided by the figure: what takes longer the slower it goes."""
        return Interval(amount / self.value, amount / self.high, amount / self.low)


NOTHING = Interval(0.0, 0.0, 0.0)
