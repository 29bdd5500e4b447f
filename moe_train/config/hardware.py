"""What the machine can do and costs, and where a run's figures go."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from moe_train.config.fields import STRICT, Positive, require

Tera = Annotated[float, Field(gt=0, le=1e6)]  # a figure in FLOP/s is out of bounds
Dollars = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Date = Annotated[
    str, Field(pattern=r"^\d{4}(-(0[1-9]|1[0-2])(-(0[1-9]|[12]\d|3[01]))?)?$")
]  # 2026, 2026-03 or 2026-03-31


@dataclass(frozen=True, config=STRICT)
class PeakConfig:
    """Dense matmul rates in TFLOP/s (never the sparse figures of vendor tables); None where unknown or not there."""

    bfloat16: Tera | None
    float8: Tera | None
    float32: Tera | None


@dataclass(frozen=True, config=STRICT)
class LinksConfig:
    """What a device can send at its rated speed, one way, in GB/s, to its node and through its own network card."""

    devices_per_node: Positive
    in_node_gb_s: Annotated[float, Field(gt=0, le=1e5)]
    between_nodes_gb_s: Annotated[float, Field(gt=0, le=1e5)]
    source: str
    date: Date


@dataclass(frozen=True, config=STRICT)
class HardwareConfig:
    """One device: what it can do and what an hour of it costs, each with where the figure is from. None is unknown."""

    name: str
    match: tuple[str, ...]  # regular expressions on the name the driver reports
    memory_gb: Annotated[float, Field(gt=0, le=1e5)] | None
    bandwidth_tb_s: Annotated[float, Field(gt=0, le=1e4)] | None
    tdp_w: Annotated[float, Field(gt=0, le=1e5)] | None
    peak_tflops: PeakConfig
    specification_source: str | None  # of memory, bandwidth, power and peaks
    specification_date: Date | None
    price_usd_per_hour: Dollars | None  # to rent a device; a core where it is a CPU
    price_range_usd_per_hour: tuple[Dollars, Dollars] | None  # what others asked for it at the time
    price_source: str | None
    price_date: Date | None
    purchase_usd: Dollars | None  # to buy a device; a core where it is a CPU
    purchase_source: str | None
    purchase_date: Date | None
    links: LinksConfig | None = None  # runs from before this key lack it

    def __post_init__(self) -> None:
        low, high = self.price_range_usd_per_hour or (0.0, 0.0)
        require(low <= high, f"price_range_usd_per_hour={[low, high]}: the lower price comes first")


ConsoleChoice = Literal["auto", "panel", "lines", "none"]  # auto: a panel on a terminal, lines elsewhere


@dataclass(frozen=True, config=STRICT)
class TrackingConfig:
    wandb: Literal["auto", "offline", "online", "off"]  # auto: online where an API key is found, offline otherwise
    project: str
    group: str | None
    tags: tuple[str, ...]
    notes: str | None
    log_every_steps: Positive
    console: ConsoleChoice = "auto"  # what stderr shows of progress; runs from before this key lack it
