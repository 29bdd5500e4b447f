"""Which device this is, what it can do, and what an hour of it costs.

The figures are in `configs/hardware/*.yaml`, each with its source. `hardware=auto` looks the device up by the name its
driver reports; what the user sets beside it wins. A device that is not known has no figures: they are never guessed.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from pydantic import TypeAdapter, ValidationError

from moe_train.config import HardwareConfig, PeakConfig
from moe_train.errors import UserError

GIVEN = "given in the configuration"


def load_hardware(path: Path) -> HardwareConfig:
    """One file of `configs/hardware`; UserError where a key is missing, unknown or of a wrong type."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        return TypeAdapter(HardwareConfig).validate_json(json.dumps(content), strict=True)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no valid YAML ({error}): correct the file") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {key}: {first['msg']}: correct the file") from error


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


def _with_own_sources(chosen: HardwareConfig, file: HardwareConfig) -> HardwareConfig:
    """A figure that is not the file's must not carry the file's source."""
    if chosen.price_usd_per_hour != file.price_usd_per_hour and chosen.price_source == file.price_source:
        chosen = dataclasses.replace(chosen, price_source=GIVEN, price_date=None)
    if chosen.peak_tflops != file.peak_tflops and chosen.peak_source == file.peak_source:
        chosen = dataclasses.replace(chosen, peak_source=GIVEN)
    return chosen


def detect(
    config: HardwareConfig, configs_dir: Path, device_type: Literal["cpu", "cuda"], device_name: str
) -> tuple[HardwareConfig, list[str]]:
    """The hardware a run is priced by, and one-line notes for the user.

    `configs_dir` is the folder `configs`; `device_name` is the driver's (on a CPU any name to show). With
    `config.name == "auto"` the device's own file is taken and the figures set in `config` win over the file's;
    otherwise `config` is kept, even where it names another device than the one at hand (noted).
    """
    folder = configs_dir / "hardware"
    notes: list[str] = []
    if config.name == "auto":
        unknown = HardwareConfig(
            device_name, (), None, None, None, PeakConfig(None, None, None), None, None, None, None
        )
        file = _find(folder, device_type, device_name) or unknown
        chosen = _with_own_sources(_overlay(file, config), file)
    else:
        named = folder / f"{config.name}.yaml"
        chosen = _with_own_sources(config, load_hardware(named)) if named.is_file() else config
        if not _stands_for(config, device_type, device_name):
            notes.append(f"the prices of {config.name} are applied to {device_name}")
    if chosen.price_usd_per_hour is None:
        notes.append(
            f"no price known for {device_name}: cost figures are absent; give hardware.price_usd_per_hour=…",
        )
    return chosen, notes


def price_per_device(hardware: HardwareConfig, device_type: Literal["cpu", "cuda"], num_threads: int) -> float | None:
    """US dollars an hour for one device of the run; on a CPU a device is a process with its `num_threads` cores.

    The price of a CPU is a core's. A GPU's price that the user applies to a CPU stays the price of the whole device.
    """
    price = hardware.price_usd_per_hour
    if price is None:
        return None
    return price * num_threads if device_type == "cpu" and not hardware.match else price
