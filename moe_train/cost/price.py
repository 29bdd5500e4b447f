"""How seconds and joules become dollars, on rented devices and on one's own.

rental: the price of an hour, energy included. owned: the purchase price spread evenly over the hours of a stated life,
and the energy drawn at a stated tariff. What cannot be known (no price, energy that nothing measures) makes the figure
None; it is never guessed.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Literal

from moe_train.config import CostConfig, HardwareConfig
from moe_train.cost.hardware import age_note

JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Price:
    """What one device of a run costs. `usd_per_hour` is its rent, or the wear of what it was bought for."""

    basis: Literal["rental", "owned"]
    usd_per_hour: float | None
    usd_per_kwh: float | None  # None where the rent includes energy
    source: str | None
    date: str | None

    def usd(self, device_seconds: float, joules: float | None) -> float | None:
        """US dollars for so many seconds of one device and the energy drawn meanwhile; None if either is unknown."""
        energy = self.usd_of_energy(joules)
        if self.usd_per_hour is None or energy is None:
            return None
        return self.usd_per_hour * device_seconds / 3600 + energy

    def usd_of_energy(self, joules: float | None) -> float | None:
        """The part of it that is the energy bill; 0 on rented devices."""
        if self.usd_per_kwh is None:
            return 0.0
        return None if joules is None else joules / JOULES_PER_KWH * self.usd_per_kwh


def price_of(
    hardware: HardwareConfig, cost: CostConfig, device_type: Literal["cpu", "cuda"], num_threads: int
) -> Price:
    """The price of one device of a run: on a CPU of a process with its `num_threads` cores.

    The figures of a CPU's file are a core's. A GPU's that the user applies to a CPU stay those of the whole device.
    """
    cores = num_threads if device_type == "cpu" and not hardware.match else 1
    if cost.basis == "rental":
        rent = hardware.price_usd_per_hour
        per_hour = None if rent is None else rent * cores
        return Price("rental", per_hour, None, hardware.price_source, hardware.price_date)
    bought = hardware.purchase_usd
    wear = None if bought is None else bought * cores / cost.life_hours
    source = hardware.purchase_source and (
        f"bought for {bought:g}{' a core' if cores != 1 else ''} ({hardware.purchase_source}), "
        f"{cost.life_hours:,.0f} hours of life"
    )
    return Price("owned", wear, cost.usd_per_kwh, source, hardware.purchase_date)


def price_notes(price: Price, device: str, energy_known: bool, today: date) -> list[str]:
    """What the user should know of it: that it is missing, old or undated."""
    rental = price.basis == "rental"
    key = "hardware.price_usd_per_hour" if rental else "hardware.purchase_usd"
    notes = []
    if price.usd_per_hour is None:
        kind = "price" if rental else "purchase price"
        notes.append(f"no {kind} known for {device}: cost figures are absent; give {key}=…")
    elif note := age_note(device, price.date, price.source, today, key):
        notes.append(note)
    if price.usd_per_kwh is not None and not energy_known:
        notes.append(
            "cost.basis=owned, and energy is not measured here: cost figures are absent; give cost.watts=… of a device"
        )
    return notes
