"""How a run is spread over processes, a device each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from moe_train.config.fields import STRICT, Size, require

LayoutName = Literal["auto", "single", "ddp", "fsdp2", "hybrid", "ep", "ep_fsdp2"]
DispatchFormat = Literal["compute", "fp8"]
Timeout = Annotated[float, Field(ge=1, le=1e6, allow_inf_nan=False)]  # a network counts milliseconds in 32 bits


@dataclass(frozen=True, config=STRICT)
class ParallelConfig:
    """What every process holds of the model; each works on sequences of its own in all layouts (parallel/layouts.py).

    It has values of its own because configurations of older runs lack it.
    """

    layout: LayoutName = "auto"  # auto: single, or ddp where there are several processes
    processes: Size | None = None  # refused where there are more or fewer; None: as many as there are
    shard: Size | None = None  # hybrid: processes that share out a replica; None: those of a machine
    expert_parallel: Size | None = None  # ep, ep_fsdp2: processes that share out the experts; None: all
    dispatch_format: DispatchFormat = "compute"  # of tokens on their way to experts: fp8, or as they are
    timeout_seconds: Timeout = 600.0  # that a process waits for the others before the run ends

    def __post_init__(self) -> None:
        require(
            self.shard is None or self.layout == "hybrid",
            f"parallel.shard={self.shard} does nothing with parallel.layout={self.layout}: choose parallel=hybrid",
        )
        require(
            self.expert_parallel is None or self.layout in ("ep", "ep_fsdp2"),
            f"parallel.expert_parallel={self.expert_parallel} does nothing with parallel.layout={self.layout}: "
            "choose parallel=ep or ep_fsdp2",
        )
        require(
            self.dispatch_format == "compute" or self.layout in ("ep", "ep_fsdp2"),
            f"parallel.dispatch_format={self.dispatch_format} does nothing with parallel.layout={self.layout}, where "
            "no token travels: choose parallel=ep or ep_fsdp2",
        )
