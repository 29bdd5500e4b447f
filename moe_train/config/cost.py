"""What a run is charged, where that is written down, and what it may come to."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from moe_train.config.fields import STRICT, NonNegative, PositiveFloat, require

Purpose = Literal["final", "tuning", "seed"]


@dataclass(frozen=True, config=STRICT)
class CostConfig:
    """How seconds and joules become dollars, and the account they go into. Nothing here changes a loss.

    rental: the price of an hour (hardware.price_usd_per_hour), energy included. owned: the purchase price
    (hardware.purchase_usd) spread over `life_hours` of use, and the energy drawn at `usd_per_kwh`.
    """

    basis: Literal["rental", "owned"]
    life_hours: PositiveFloat  # owned: hours of use until the device is worth nothing
    usd_per_kwh: NonNegative | None  # owned: what electricity costs, cooling included
    watts: PositiveFloat | None  # what a device draws, where there is no counter to read
    ledger: str | None  # the file every run adds its account to; None: none
    purpose: Purpose | None  # what the run is for, so that sums can keep them apart
    sweep: str | None  # the sweep and the claim it belongs to
    claim: str | None

    def __post_init__(self) -> None:
        require(
            self.basis == "rental" or self.usd_per_kwh is not None,
            "cost.basis=owned needs the price of electricity: give cost.usd_per_kwh=…",
        )
        require(self.ledger != "", "cost.ledger is empty: give a file, or null for none")


@dataclass(frozen=True, config=STRICT)
class BudgetConfig:
    """Dollars that must not be exceeded: by a run, or with -m by all runs of the grid together.

    Unlike stop.usd it is no part of what a run is: one that it ends early is annealed but not finished. The runs of a
    grid anneal to limits of their own alone, and are interrupted, with a checkpoint, when its sum is used up.
    """

    usd: PositiveFloat | None
