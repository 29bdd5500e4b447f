"""One optimizer step: micro-batches, gradient, clip, update, balance.

All losses are sums over tokens and are divided once by the number of targets in the global batch, so a step is the same
however it is cut into micro-batches and processes, padded blocks included. Nothing here waits for the device.
"""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import torch
from torch import Tensor, nn

from moe_train.config import RunConfig
from moe_train.data.batches import Batches
from moe_train.model.balancing import update_selection_bias
from moe_train.model.transformer import Transformer
from moe_train.training.optimizers import set_lr
from moe_train.training.runtime import Runtime


@dataclasses.dataclass
class StepTotals:
    """Sums over the steps since the last log, on the device: reading them is what waits for it."""

    nll: Tensor
    counts_le: Tensor
    grad_norm: Tensor  # of the last step, before clipping
    targets: int = 0

    @classmethod
    def zero(cls, model: Transformer, device: torch.device) -> StepTotals:
        experts = model.config.moe.num_experts if model.config.moe else 0
        return cls(
            nll=torch.zeros((), dtype=torch.float64, device=device),
            counts_le=torch.zeros(model.config.num_moe_layers, experts, dtype=torch.int64, device=device),
            grad_norm=torch.zeros((), device=device),
        )


class Stepper:
    """Trains `model` (bare) through `wrapped` (the same model prepared by accelerate), a step at a time."""

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        model: Transformer,
        wrapped: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        batches: Batches,
    ) -> None:
        self.config = config
        self.runtime = runtime
        self.model = model
        self.wrapped = wrapped
        self.optimizers = optimizers
        self.batches = batches
        self.micro_batch_size = config.micro_batch_size or config.batch_size // runtime.world_size
        self.routers = model.routers()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.totals = StepTotals.zero(model, runtime.device)

    def load(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's share of the batch of `step`, on its device."""
        inputs, targets = self.batches.batch(step, self.runtime.rank, self.runtime.world_size)
        if self.runtime.device_type == "cuda":
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        device = self.runtime.device
        return inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)

    def step(self, step: int, inputs_bt: Tensor, targets_bt: Tensor, lr_factor: float) -> int:
        """Do optimizer step `step` (from 0); returns the targets trained on, over all ranks."""
        num_targets = self.batches.num_targets(step)
        pieces = list(zip(inputs_bt.split(self.micro_batch_size), targets_bt.split(self.micro_batch_size), strict=True))
        counts_le = torch.zeros_like(self.totals.counts_le)
        nll = torch.zeros_like(self.totals.nll)
        for micro, (inputs, targets) in enumerate(pieces):
            self._seed_dropout(step, micro)
            last = micro == len(pieces) - 1
            with contextlib.nullcontext() if last else self.runtime.accelerator.no_sync(self.wrapped):
                losses = self.wrapped(inputs, targets)
                # DDP averages gradients over ranks where a sum is wanted.
                (losses.objective * (self.runtime.world_size / num_targets)).backward()
            nll += losses.nll
            counts_le += losses.counts_le
        counts_le = self.runtime.summed(counts_le)

        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.max_grad_norm or float("inf"))
        set_lr(self.optimizers, lr_factor)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        moe = self.model.config.moe
        if moe is not None and moe.bias_update_speed:
            update_selection_bias(self.routers, counts_le, moe.bias_update_speed)

        self.totals.nll += nll
        self.totals.counts_le += counts_le
        self.totals.grad_norm = norm
        self.totals.targets += num_targets
        return num_targets

    def _seed_dropout(self, step: int, micro: int) -> None:
        """Dropout is a function of (seed, step, micro-batch, rank), so a resumed run needs no saved random state."""
        if self.model.config.dropout:
            key = np.random.SeedSequence([self.config.seed, step, micro, self.runtime.rank])
            torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> np.uint64(1)))

    def read_totals(self) -> tuple[float, float, Tensor]:
        """Mean loss in nats a token, gradient norm and expert counts since the last call. Waits for the device."""
        totals = self.totals
        self.totals = StepTotals.zero(self.model, self.runtime.device)
        nll = self.runtime.summed(totals.nll)
        return nll.item() / max(1, totals.targets), totals.grad_norm.item(), totals.counts_le.cpu()
