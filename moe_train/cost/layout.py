"""Over which devices a model's weights, gradients and optimizer states are spread.

Every device works on tokens of its own in all of them; what differs is what it holds of the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from moe_train.config import ModelConfig
from moe_train.errors import UserError

NAMES = ("single", "ddp", "fsdp2", "ep", "ep_fsdp2")


@dataclass(frozen=True)
class Layout:
    """`shard`: devices over which weights, gradients and optimizer states are cut, as by FSDP2 (ZeRO-3, arXiv
    1910.02054). `expert_parallel`: devices over which the routed experts are spread whole (arXiv 2006.16668); tokens
    travel to them. Experts on fewer devices than `shard` are cut over the rest."""

    name: str
    num_devices: int
    shard: int
    expert_parallel: int

    @classmethod
    def named(cls, name: str, num_devices: int = 1, expert_parallel: int | None = None) -> Self:
        """One of NAMES over `num_devices`; `expert_parallel` of the `ep…` ones, all devices if not given.

        Raises UserError for what cannot be."""
        if name not in NAMES:
            raise UserError(f"parallel={name} is none of {', '.join(NAMES)}: choose one of them")
        if num_devices < 1:
            raise UserError(f"num_gpus={num_devices} must be at least 1: give the number of devices")
        if name == "single" and num_devices > 1:
            raise UserError(f"parallel=single is one device, not num_gpus={num_devices}: choose ddp, fsdp2 or ep")
        spread = name in ("ep", "ep_fsdp2")
        if expert_parallel is not None and not spread:
            raise UserError(f"expert_parallel does nothing with parallel={name}: choose ep or ep_fsdp2")
        parallel = (expert_parallel or num_devices) if spread else 1
        if parallel < 1 or num_devices % parallel:
            raise UserError(
                f"expert_parallel={parallel} does not divide num_gpus={num_devices}: choose a divisor of it"
            )
        return cls(name, num_devices, num_devices if name in ("fsdp2", "ep_fsdp2") else 1, parallel)

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients outlive a step: where they are views of DDP's buckets (training/runtime.py)."""
        return self.num_devices > 1 and self.shard == 1

    @property
    def expert_share(self) -> int:
        """A device holds one part of so many of the routed experts' weights."""
        return max(self.expert_parallel, self.shard)

    def check(self, model: ModelConfig) -> None:
        """Raises UserError where the model cannot be laid out so."""
        if self.expert_parallel == 1:
            return
        if model.moe is None:
            raise UserError(f"parallel={self.name} spreads experts and {model.name} has none: choose fsdp2 or ddp")
        if model.moe.num_experts % self.expert_parallel:
            most = math.gcd(model.moe.num_experts, self.num_devices)
            raise UserError(
                f"expert_parallel={self.expert_parallel} does not divide the {model.moe.num_experts} experts of "
                f"{model.name}: choose expert_parallel={most}, or another number of devices"
            )


SINGLE = Layout.named("single")
