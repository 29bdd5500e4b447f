"""One training run: all groups together, and what makes two runs the same run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from moe_train.config.cost import BudgetConfig, CostConfig
from moe_train.config.data import AnyDataConfig
from moe_train.config.fields import STRICT, Count, NonNegative, Positive, Size, require
from moe_train.config.hardware import HardwareConfig, TrackingConfig
from moe_train.config.model import ModelConfig
from moe_train.config.parallel import ParallelConfig
from moe_train.config.precision import PrecisionConfig
from moe_train.config.training import (
    BatchRampConfig,
    CheckpointConfig,
    EvalConfig,
    OptimizerConfig,
    ScheduleConfig,
    StopConfig,
)


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """One training run. `identity` names what makes two runs the same run."""

    model: ModelConfig
    data: AnyDataConfig
    precision: PrecisionConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    hardware: HardwareConfig
    cost: CostConfig
    budget: BudgetConfig
    tracking: TrackingConfig
    stop: StopConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    name: str
    run_dir: str | None
    resume: str | None
    init_from: str | None  # a run folder or checkpoint whose weights a new run starts from
    seed: Count
    batch_size: Size  # sequences an optimizer step, over all devices
    batch_ramp: BatchRampConfig | None  # smaller batches at the start
    micro_batch_size: Size | None  # sequences a device takes at once; None: all of its share
    num_threads: Positive | None  # CPU cores of a process; None: those there are, shared out
    z_loss_weight: NonNegative
    activation_checkpointing: bool  # keep only what enters a layer and compute the rest again in the backward pass
    deterministic: bool
    traceback: bool
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)  # older runs' have none
    cpu_kernels: Literal["auto", "compiled", "torch"] = "auto"  # of BF16 products; older runs' have none
    cuda_graphs: Literal["auto", "always", "never"] = "auto"  # of a step; older runs' have none

    def __post_init__(self) -> None:
        for key in ("run_dir", "resume", "init_from"):
            require(getattr(self, key) != "", f"{key} is empty: give a path or leave it out")
        require("/" not in self.name, f"name={self.name} is part of a folder's name: leave out the /")
        ramp = self.batch_ramp
        require(
            ramp is None or self.batch_size % ramp.start == 0,
            f"batch_ramp.start={ramp and ramp.start} does not divide batch_size={self.batch_size}: choose a divisor",
        )
        require(
            ramp is None or ramp.tokens <= 10**6 * ramp.start * self.data.sequence_length,
            f"batch_ramp.tokens={ramp and ramp.tokens} is more than a million steps of "
            f"batch_ramp.start={ramp and ramp.start}: lower it or raise the start",
        )
        require(
            self.init_from is None or self.resume in (None, "auto"),
            f"init_from={self.init_from} starts a new run, resume={self.resume} goes on with another: give one of them",
        )
        require(
            self.model.mtp_depth < self.data.sequence_length,
            f"model.mtp.depth={self.model.mtp_depth} needs sequences longer than "
            f"data.sequence_length={self.data.sequence_length}: lower it",
        )

    @property
    def vocab_size(self) -> int:
        """Of the built model, as far as it is known before the tokenizer is: a BPE is trained to its full size."""
        size = 257 if self.data.tokenizer == "bytes" else self.data.vocab_size
        return self.model.vocab_size or -(-size // 64) * 64

    _NOT_IDENTITY = (
        *("name", "run_dir", "resume", "tracking", "checkpoint", "num_threads", "traceback"),
        *("cpu_kernels", "cuda_graphs"),
        *("hardware", "cost", "budget", "parallel"),
    )

    def identity(self) -> dict[str, Any]:
        """The settings that can change a run's losses: all but where it is, what it is called and what is reported."""
        settings = to_dict(self)
        for key in self._NOT_IDENTITY:
            del settings[key]
        del settings["data"]["cache_dir"]
        if self.parallel.dispatch_format != "compute":  # all else there is to rounding the same
            settings["parallel.dispatch_format"] = self.parallel.dispatch_format
        return settings

    def config_hash(self, without: tuple[str, ...] = ()) -> str:
        """Twelve hex digits that name the run: the same for the same settings and seed, on any machine."""
        canonical = json.dumps({k: v for k, v in self.identity().items() if k not in without}, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def model_digest(model: ModelConfig) -> str:
    """Twelve hex digits of everything that decides what a model computes from its weights."""
    settings = {k: v for k, v in to_dict(model.resolved()).items() if k not in ("name", "vocab_size", "dropout")}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain dicts and lists, ready for YAML and JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def differences(before: Any, now: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(key, before, now) of every setting in which two configurations differ, keys with dots."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = list(before) + [key for key in now if key not in before]
        return [
            d for key in keys for d in differences(before.get(key), now.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if before == now else [(prefix, before, now)]
