"""Which device this is, what it can do, and what an hour of it costs.

The figures are in `configs/hardware/*.yaml`, each with its source. `hardware=auto` looks the device up by the name its
driver reports; what the user sets beside it wins. A device that is not known has no figures: they are never guessed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from pydantic import TypeAdapter, ValidationError

from moe_train.config import HardwareConfig, PeakConfig
from moe_train.errors import UserError

GIVEN = "given in the configuration"
PRICE_VARIABLE = "MOE_TRAIN_PRICE_USD_PER_HOUR"


def load_hardware(path: Path) -> HardwareConfig:
    """One file of `configs/hardware`; UserError where a key is missing, unknown or of a wrong type."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        return TypeAdapter(HardwareConfig).validate_json(json.dumps(content), strict=True)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no valid YAML ({error}): correct the file") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {key + ': ' if key else ''}{reason}: correct the file") from error


def _stands_for(hardware: HardwareConfig, device_type: str, device_name: str) -> bool:
    """A driver's name must match in full: "NVIDIA L4" is not "NVIDIA L40S". A CPU has no driver, so no patterns."""
    if device_type == "cpu":
        return not hardware.match
    return any(re.fullmatch(pattern, device_name) for pattern in hardware.match)


def _find(folder: Path, device_type: str, device_name: str) -> HardwareConfig | None:
    if device_type == "cpu":
        return load_hardware(folder / "cpu.yaml")
    files = [load_hardware(path) for path in sorted(folder.glob("*.yaml"))]
    found = [hardware for hardware in files if _stands_for(hardware, device_type, device_name)]
    if len(found) > 1:
        names = " and ".join(hardware.name for hardware in found)
        raise UserError(f"{device_name} matches {names} in {folder}: choose one, e.g. hardware={found[0].name}")
    return found[0] if found else None


def _unknown(device_name: str) -> HardwareConfig:
    blank: dict[str, Any] = {field.name: None for field in dataclasses.fields(HardwareConfig)}
    peaks = PeakConfig(bfloat16=None, float8=None, float32=None)
    return HardwareConfig(**blank | {"name": device_name, "match": (), "peak_tflops": peaks})


def _known(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass that are set."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {name: value for name, value in values.items() if value is not None}


def _overlay(base: HardwareConfig, given: HardwareConfig) -> HardwareConfig:
    """`base` with every figure that `given` sets."""
    figures = _known(given) | {
        "name": base.name,
        "match": base.match,
        "peak_tflops": dataclasses.replace(base.peak_tflops, **_known(given.peak_tflops)),
    }
    return dataclasses.replace(base, **figures)


# Figures and what says where they are from.
_SOURCED = {
    "specification": ("memory_gb", "bandwidth_tb_s", "tdp_w", "peak_tflops"),
    "price": ("price_usd_per_hour",),
    "purchase": ("purchase_usd",),
}


def _with_own_sources(chosen: HardwareConfig, file: HardwareConfig) -> HardwareConfig:
    """A figure that is not the file's must not carry the file's source."""
    for kind, figures in _SOURCED.items():
        source = f"{kind}_source"
        own = any(getattr(chosen, figure) != getattr(file, figure) for figure in figures)
        if own and getattr(chosen, source) == getattr(file, source):
            changed: dict[str, Any] = {source: GIVEN, f"{kind}_date": None}
            if kind == "price":
                changed["price_range_usd_per_hour"] = None
            chosen = dataclasses.replace(chosen, **changed)
    return chosen


def _paid_by_the_launcher(environment: Mapping[str, str]) -> float | None:
    """US dollars an hour and device that whoever started the process says it costs."""
    text = environment.get(PRICE_VARIABLE)
    if not text:
        return None
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not 0 <= price <= 1e9:
        raise UserError(f"the environment's {PRICE_VARIABLE}={text} is no price in dollars: correct or unset it")
    return price


def detect(
    config: HardwareConfig,
    configs_dir: Path,
    device_type: Literal["cpu", "cuda"],
    device_name: str,
    environment: Mapping[str, str],
) -> tuple[HardwareConfig, list[str]]:
    """The hardware a run is priced by, and one-line notes for the user.

    `configs_dir` is the folder `configs`; `device_name` is the driver's (on a CPU any name to show). With
    `config.name == "auto"` the device's own file is taken and the figures set in `config` win over the file's;
    otherwise `config` is kept, even where it names another device than the one at hand (noted). A price in the
    environment (MOE_TRAIN_PRICE_USD_PER_HOUR: an hour of a device, on a CPU of a core) wins over that of a file here,
    and one that the user sets wins over both.
    """
    folder = configs_dir / "hardware"
    notes: list[str] = []
    file: HardwareConfig | None
    if config.name == "auto":
        file = _find(folder, device_type, device_name) or _unknown(device_name)
        chosen = _with_own_sources(_overlay(file, config), file)
    else:
        named = folder / f"{config.name}.yaml"
        file = load_hardware(named) if named.is_file() else None
        chosen = _with_own_sources(config, file) if file else config
        if not _stands_for(config, device_type, device_name):
            notes.append(f"the prices of {config.name} are applied to {device_name}")
    if chosen.price_usd_per_hour is None or (file and chosen.price_source == file.price_source):
        chosen = at_the_launchers_price(chosen, environment)
    return chosen, notes


def at_the_launchers_price(hardware: HardwareConfig, environment: Mapping[str, str]) -> HardwareConfig:
    """The hardware at the price in the environment, where there is one. Raises UserError if it is none."""
    paid = _paid_by_the_launcher(environment)
    if paid is None:
        return hardware
    return dataclasses.replace(
        hardware,
        price_usd_per_hour=paid,
        price_range_usd_per_hour=None,
        price_source=f"given by {PRICE_VARIABLE}",
        price_date=None,
    )


def age_note(name: str, price_date: str | None, source: str | None, today: date, key: str) -> str | None:
    """What to say of a price more than a year old, or whose age nobody knows; None where it is recent or the user's.

    `key` is the setting that would replace it.
    """
    if source is None or "given " in source:
        return None
    if price_date is None:
        return f"the price of {name} has no date: check it, or give {key}=…"
    newest = date.fromisoformat((price_date + "-12-28")[:10] if len(price_date) == 4 else (price_date + "-28")[:10])
    if (today - newest).days <= 365:
        return None
    return f"the price of {name} is of {price_date}, more than a year old: check it, or give {key}=…"
