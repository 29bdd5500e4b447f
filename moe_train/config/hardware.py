"""What the machine can do and costs, and where a run's figures go."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from moe_train.config.fields import STRICT, Positive, PositiveFloat


@dataclass(frozen=True, config=STRICT)
class PeakConfig:
    """Dense matmul rates in TFLOP/s (never the sparse figures of vendor tables); None where unknown or not there."""

    bfloat16: PositiveFloat | None
    float8: PositiveFloat | None
    float32: PositiveFloat | None


@dataclass(frozen=True, config=STRICT)
class HardwareConfig:
    """One device: what it can do and what an hour of it costs, each with where the figure is from. None is unknown."""

    name: str
    match: tuple[str, ...]  # regular expressions on the name the driver reports
    memory_gb: PositiveFloat | None
    bandwidth_tb_s: PositiveFloat | None
    tdp_w: PositiveFloat | None
    peak_tflops: PeakConfig
    peak_source: str | None
    price_usd_per_hour: Annotated[float, Field(ge=0, le=1e9)] | None  # a device; a core where kind is cpu
    price_source: str | None
    price_date: str | None


@dataclass(frozen=True, config=STRICT)
class TrackingConfig:
    wandb: Literal["auto", "offline", "online", "off"]  # auto: online where an API key is found, offline otherwise
    project: str
    group: str | None
    tags: tuple[str, ...]
    notes: str | None
    log_every_steps: Positive
