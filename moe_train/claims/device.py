"""Which device the runs will be made on, and whether those that are there already were made on the same."""

from __future__ import annotations

import os
from dataclasses import dataclass

from moe_train.claims.plan import Plan
from moe_train.claims.results import Folder
from moe_train.claims.tuning import planned
from moe_train.compose import CONFIGS
from moe_train.config.claim import TIMED
from moe_train.cost.hardware import detect
from moe_train.errors import UserError
from moe_train.machine import cpu_name
from moe_train.sweeps.devices import devices_here


@dataclass(frozen=True)
class Device:
    """`price_usd_per_hour`: of a GPU, or of a core."""

    name: str
    count: int
    on_gpu: bool
    hardware: str
    price_usd_per_hour: float | None


def device_here(plan: Plan) -> Device:
    import torch

    devices = devices_here()
    on_gpu = devices.on_gpu
    name = torch.cuda.get_device_name() if on_gpu else cpu_name()
    config = next(iter(plan.arms.values())).config
    hardware, _ = detect(config.hardware, CONFIGS, "cuda" if on_gpu else "cpu", name, os.environ)
    return Device(name, devices.count, on_gpu, hardware.name, hardware.price_usd_per_hour)


def check_hardware(plan: Plan, device: Device) -> None:
    """Refuse to bill a CPU as a GPU: UserError. What a GPU is called may be corrected (hardware=h200)."""
    hardware = next(iter(plan.arms.values())).config.hardware
    if hardware.match and not device.on_gpu:
        raise UserError(
            f"hardware={hardware.name} is a GPU, and there is none: leave it out to make the runs on {device.name}, or "
            "add dry_run=true to reckon for that GPU"
        )


def check_same_device(plan: Plan, folder: Folder, device: Device) -> None:
    """Refuse, for a claim about seconds or dollars, runs that are there of another device or price: UserError."""
    timed = [c.name for c in plan.claim.config.at(plan.scale_name) if c.measure in TIMED]
    if not timed:
        return
    there, _ = folder.results(planned(plan, folder))
    for result in there:
        summary = result.summary
        cores = (summary["num_threads"] or 1) if summary["hardware"] == "cpu" else 1
        price = None if summary["price_usd_per_hour"] is None else summary["price_usd_per_hour"] / cores
        same_price = price == device.price_usd_per_hour or (
            price is not None
            and device.price_usd_per_hour is not None
            and abs(price - device.price_usd_per_hour) < 1e-9 * max(1.0, price)
        )
        if summary["device_name"] != device.name or not same_price:
            raise UserError(
                f"claim={plan.claim.name} compares {timed[0]}, and {result.folder} was made on "
                f"{summary['device_name']} at {_dollars(price)}, not on {device.name} at "
                f"{_dollars(device.price_usd_per_hour)}: give another out=, or that price with "
                "hardware.price_usd_per_hour="
            )


def _dollars(price: float | None) -> str:
    return "no price" if price is None else f"${price:g} an hour"
