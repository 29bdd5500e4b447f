"""Dollars from seconds and joules, rented and owned, and what is said where they cannot be known."""

from __future__ import annotations

import dataclasses
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.compose import CONFIGS
from moe_train.config import CostConfig, HardwareConfig
from moe_train.cost.hardware import load_hardware
from moe_train.cost.price import Price, price_notes, price_of

TODAY = date(2026, 11, 25)
RENTAL = CostConfig("rental", 26_280.0, None, None, None, None, None, None)
OWNED = dataclasses.replace(RENTAL, basis="owned", life_hours=10_000.0, usd_per_kwh=0.20)


def hardware(file: str, **changes: object) -> HardwareConfig:
    return dataclasses.replace(load_hardware(CONFIGS / f"hardware/{file}.yaml"), **changes)


@given(st.floats(0, 1e4), st.floats(0, 1e9))
def test_rent_is_the_price_of_an_hour_times_hours_and_includes_energy(price: float, seconds: float) -> None:
    rented = Price("rental", price, None, None, None)
    assert rented.usd(seconds, None) == rented.usd(seconds, 1e9) == pytest.approx(price * seconds / 3600)


@given(st.floats(0, 1e6), st.floats(0, 1e8), st.floats(0, 1e12))
def test_an_owned_device_costs_its_wear_and_its_energy(bought: float, seconds: float, joules: float) -> None:
    price = price_of(hardware("rtx_4090", purchase_usd=bought), OWNED, "cuda", 8)
    assert price.usd(seconds, joules) == pytest.approx(bought / 10_000 * seconds / 3600 + joules / 3.6e6 * 0.20)
    assert price.usd(seconds, None) is None


def test_after_its_life_an_owned_device_has_cost_what_it_was_bought_for() -> None:
    price = price_of(hardware("rtx_4090", purchase_usd=1599.0), OWNED, "cuda", 8)
    assert price.usd(10_000 * 3600, 0.0) == pytest.approx(1599.0)


def test_a_cpu_is_priced_by_its_cores_and_a_gpu_as_a_whole_even_where_a_cpu_stands_in_for_it() -> None:
    cpu = hardware("cpu", price_usd_per_hour=0.05, purchase_usd=100.0, purchase_source="a shop")
    assert price_of(cpu, RENTAL, "cpu", 8).usd_per_hour == pytest.approx(0.4)
    assert price_of(cpu, OWNED, "cpu", 8).usd_per_hour == pytest.approx(0.08)
    h100 = hardware("h100", price_usd_per_hour=2.5)
    assert [price_of(h100, RENTAL, kind, 8).usd_per_hour for kind in ("cuda", "cpu")] == [2.5, 2.5]


def test_what_is_missing_is_said_with_its_remedy() -> None:
    nothing = hardware("auto", name="Some GPU")
    for cost, key in ((RENTAL, "hardware.price_usd_per_hour"), (OWNED, "hardware.purchase_usd")):
        price = price_of(nothing, cost, "cuda", 1)
        assert price.usd(3600, 1.0) is None
        (note,) = price_notes(price, "Some GPU", True, TODAY)
        assert note.startswith("no ")
        assert f"give {key}=" in note
    owned = price_of(hardware("rtx_4090", purchase_date="2026-03"), OWNED, "cuda", 1)
    (note,) = price_notes(owned, "rtx_4090", False, TODAY)
    assert "give cost.watts=" in note
    assert price_notes(price_of(hardware("h100", price_date="2026-03"), RENTAL, "cuda", 1), "h100", False, TODAY) == []


def test_old_prices_and_old_purchase_prices_are_said_to_be_old() -> None:
    for cost, changes in ((RENTAL, {"price_date": "2024"}), (OWNED, {"purchase_date": "2022-10"})):
        price = price_of(hardware("rtx_4090", **changes), cost, "cuda", 1)
        (note,) = price_notes(price, "rtx_4090", True, TODAY)
        assert "more than a year old" in note
