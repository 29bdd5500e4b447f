"""One optimizer step: micro-batches, gradient, clip, update, balance.

All losses are sums over tokens and are divided once by the number of targets in the global batch, so a step is the same
however it is cut into micro-batches and processes, padded blocks included. The exceptions are dropout, whose masks are
drawn for each micro-batch, and two kinds of router. The batch-wise balance loss takes its shares from the micro-batch
of all ranks, so it is the same for any number of ranks and not for any number of micro-batches. Experts with capacity,
and experts that choose, share out their places within one rank's micro-batch, as Switch and GShard do. Nothing here
waits for the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_train.config import RunConfig
from moe_train.data.batches import Batches
from moe_train.errors import UserError
from moe_train.model.balancing import update_selection_bias
from moe_train.model.transformer import Losses, Transformer
from moe_train.parallel import communication
from moe_train.parallel.spread import Replicated, Spread
from moe_train.precision.fp8 import holding_weights
from moe_train.precision.health import Counts, LayerRates
from moe_train.precision.narrowed import Narrowed
from moe_train.precision.recipes import fp8_layers, modules_in_fp8
from moe_train.training import clipping
from moe_train.training.cuda_graph import Captured, RatesOnDevice
from moe_train.training.optimizers import set_lr
from moe_train.training.runtime import Runtime


@dataclasses.dataclass
class StepTotals:
    """Sums over the steps since the last log, on the device: reading them is what waits for it.

    Those of this rank alone, but for the expert counts, which every step sums over the ranks for the selection bias.
    """

    nll: Tensor
    auxiliary: Tensor
    mtp_nll_k: Tensor
    mtp_targets_k: Tensor
    dropped_l: Tensor
    counts_le: Tensor
    grad_norm: Tensor  # of the last step, before clipping
    mtp_weight: float = 0.0  # λ of the last step
    targets: int = 0  # of all ranks
    batch_size: int = 0  # of the last step

    @classmethod
    def zero(cls, model: Transformer, device: torch.device) -> StepTotals:
        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        layers, depth = model.config.num_routers, model.config.mtp_depth
        experts = model.config.moe.num_experts if model.config.moe else 0
        return cls(
            nll=zeros(),
            auxiliary=zeros(),
            mtp_nll_k=zeros(depth),
            mtp_targets_k=zeros(depth),
            dropped_l=zeros(layers),
            counts_le=zeros(layers, experts, dtype=torch.int64),
            grad_norm=zeros(dtype=torch.float32),
        )

    def add(self, more: Losses | StepTotals) -> None:
        """Add a micro-batch, or the micro-batches of a step."""
        self.nll += more.nll
        self.auxiliary += more.auxiliary
        self.mtp_nll_k += more.mtp_nll_k
        self.mtp_targets_k += more.mtp_targets_k
        self.dropped_l += more.dropped_l
        self.counts_le += more.counts_le


class StepFigures(NamedTuple):
    """What the steps since the last log came to, over all ranks."""

    loss: float  # nats a token, of the main model
    auxiliary_loss: float  # the routers' weighted losses, a token
    mtp_losses: list[float]  # nats a token of each MTP module
    mtp_weight: float  # λ of the last step
    dropped_fraction: float  # of what capacity left without a place, the mean over MoE layers
    counts_le: Tensor
    grad_norm: float
    batch_size: int  # sequences of the last step
    fp8_rates: LayerRates  # of the steps that were counted; empty where none was


class _Given(NamedTuple):
    """What a step does beside its batch and rates; a CUDA graph is made for one."""

    num_targets: int  # of all ranks
    mtp_weight: float
    bias_speed: float  # 0: selection biases stay
    modules_in_fp8: int


class _Done(NamedTuple):
    sums: StepTotals
    norm: Tensor  # of the gradient, before clipping


class Stepper:
    """Trains `model` (bare) as it is spread over the processes, a step at a time.

    `fp8_counts`: where the steps that are counted leave what FP8 did to their operands.
    """

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        model: Transformer,
        spread: Spread,
        optimizers: list[torch.optim.Optimizer],
        batches: Batches,
        fp8_counts: Counts | None = None,
    ) -> None:
        self.config = config
        self.runtime = runtime
        self.model = model
        self.spread = spread
        self.optimizers = optimizers
        self._multiplies = not clipping.all_take_coefficient(optimizers)  # gradients, when it clips
        self.batches = batches
        self.fp8_counts = fp8_counts
        self.micro_batch_size = config.micro_batch_size or config.batch_size // runtime.world_size
        self.routers = model.routers()
        self._began_in_fp8 = modules_in_fp8(model)  # some may go back, and no other comes
        self._rates: RatesOnDevice | None = None
        self._captured_step: Captured[_Done] | None = None
        self._captured_passes: Captured[StepTotals] | None = None
        if self._asks_host() and config.cuda_graphs == "always":
            raise UserError("cuda_graphs=always: this backend of FP8 reads where groups end on the host; use auto")
        if runtime.cuda_graphs and not self._asks_host():
            parameters = list(model.parameters())
            self._rates = RatesOnDevice(optimizers, runtime.device)
            self._captured_step, self._captured_passes = Captured[_Done](parameters), Captured[StepTotals](parameters)
        whole_on_gpu = runtime.device_type == "cuda" and isinstance(spread, Replicated)
        self._narrowed = Narrowed() if whole_on_gpu else None
        self.totals = StepTotals.zero(model, runtime.device)
        self.device_waited = True  # for the last batch: a CPU always does, a GPU where it had caught up with the host

    @property
    def captures(self) -> bool:
        """Whether steps are replayed as a CUDA graph."""
        return self._captured_step is not None

    def _asks_host(self) -> bool:
        return any(layer.backend.asks_host for layer in fp8_layers(self.model).values())

    def _modules_in_fp8(self) -> int:
        """How many there are now. Asked every step, so it takes microseconds."""
        return sum(module.fp8 is not None for module in self._began_in_fp8)

    def load(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's share of the batch of `step`, on its device, which waited for it if `device_waited` says so."""
        inputs, targets = self.batches.batch(step, self.runtime.rank, self.runtime.world_size)
        if self.runtime.device_type == "cuda":
            self.device_waited = torch.cuda.current_stream(self.runtime.device).query()
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        device = self.runtime.device
        return inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)

    def step(
        self,
        step: int,
        inputs_bt: Tensor,
        targets_bt: Tensor,
        lr_factor: float,
        progress: float,
        *,
        counts_fp8: bool = False,
        replays: bool = True,
    ) -> int:
        """Do optimizer step `step` (from 0) at a run's `progress`; returns the targets trained on, over all ranks.

        `counts_fp8`: count what FP8 does to operands. `replays`: from a CUDA graph where steps are; it counts nothing.
        """
        mtp, moe = self.model.config.mtp, self.model.config.moe
        given = _Given(
            num_targets=self.batches.num_targets(step),
            mtp_weight=0.0 if mtp is None else mtp.weight_at(progress),
            bias_speed=0.0 if moe is None or progress >= moe.bias_update_fraction else moe.bias_update_speed,
            modules_in_fp8=self._modules_in_fp8(),
        )
        set_lr(self.optimizers, lr_factor)
        if self._rates is not None:
            self._rates.update()

        def whole(inputs_bt: Tensor, targets_bt: Tensor) -> _Done:
            return self._step(step, inputs_bt, targets_bt, given, counted)

        counted = self.fp8_counts.counting() if counts_fp8 and self.fp8_counts else None
        if self._captured_step is None or counted is not None or not replays:
            done = whole(inputs_bt, targets_bt)
        else:
            done = self._captured_step(given, whole, inputs_bt, targets_bt)
        self.totals.add(done.sums)
        self.totals.grad_norm = done.norm
        self.totals.targets += given.num_targets
        self.totals.mtp_weight = given.mtp_weight
        self.totals.batch_size = len(inputs_bt) * self.runtime.world_size
        return given.num_targets

    def passes(self, step: int, inputs_bt: Tensor, targets_bt: Tensor) -> StepTotals:
        """The forward and backward passes of a step alone; leaves gradients."""
        given = _Given(self.batches.num_targets(step), 0.0, 0.0, self._modules_in_fp8())

        def passes(inputs_bt: Tensor, targets_bt: Tensor) -> StepTotals:
            return self._passes(step, inputs_bt, targets_bt, given)

        if self._captured_passes is None:
            return passes(inputs_bt, targets_bt)
        return self._captured_passes(given, passes, inputs_bt, targets_bt)

    def _step(
        self,
        step: int,
        inputs_bt: Tensor,
        targets_bt: Tensor,
        given: _Given,
        counted: AbstractContextManager[None] | None,
    ) -> _Done:
        """`counted`: within, what FP8 does to operands is counted."""
        with counted or contextlib.nullcontext():
            sums = self._passes(step, inputs_bt, targets_bt, given)
        counts_le = self.runtime.summed(sums.counts_le)
        max_norm = self.config.optimizer.max_grad_norm or float("inf")
        norm, coefficient = self.spread.clip(max_norm, multiply=self._multiplies)
        with contextlib.nullcontext() if self._rates is None else self._rates.given():
            for optimizer in self.optimizers:
                clipping.step(optimizer, coefficient)
                optimizer.zero_grad(set_to_none=True)
        self.spread.release_gradients()
        if given.bias_speed:
            update_selection_bias(self.routers, counts_le, given.bias_speed)
        return _Done(dataclasses.replace(sums, counts_le=counts_le), norm)

    def _passes(self, step: int, inputs_bt: Tensor, targets_bt: Tensor, given: _Given) -> StepTotals:
        """All micro-batches; the sums are of this rank."""
        sums = StepTotals.zero(self.model, self.runtime.device)
        pieces = list(zip(inputs_bt.split(self.micro_batch_size), targets_bt.split(self.micro_batch_size), strict=True))
        with holding_weights(), self._narrowed.held() if self._narrowed else contextlib.nullcontext():
            for micro, (inputs, targets) in enumerate(pieces):
                self._seed_dropout(step, micro)
                with self.spread.micro_batch(last=micro == len(pieces) - 1):
                    losses = self.spread.wrapped(inputs, targets, given.mtp_weight)
                    with communication.backward():
                        (losses.objective * (self.spread.loss_scale / given.num_targets)).backward()
                sums.add(losses)
        return sums

    def _seed_dropout(self, step: int, micro: int) -> None:
        """Dropout is a function of (seed, step, micro-batch, rank), so a resumed run needs no saved random state."""
        if self.model.config.dropout:
            key = np.random.SeedSequence([self.config.seed, step, micro, self.runtime.rank])
            torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> np.uint64(1)))

    def read_totals(self) -> StepFigures:
        """The figures of the steps since the last call. Waits for the device."""
        totals = self.totals
        self.totals = StepTotals.zero(self.model, self.runtime.device)
        depth = len(totals.mtp_nll_k)
        # One collective for all: they are few numbers.
        mine = torch.cat(
            [torch.stack([totals.nll, totals.auxiliary]), totals.mtp_nll_k, totals.mtp_targets_k, totals.dropped_l]
        )
        nll, auxiliary, *others = self.runtime.summed(mine).tolist()
        mtp_nll, mtp_targets, dropped = others[:depth], others[depth : 2 * depth], others[2 * depth :]
        return StepFigures(
            loss=nll / max(1, totals.targets),
            auxiliary_loss=auxiliary / max(1, totals.targets),
            mtp_losses=[sum_ / max(1, count) for sum_, count in zip(mtp_nll, mtp_targets)],
            mtp_weight=totals.mtp_weight,
            dropped_fraction=sum(dropped) / max(1, len(dropped) * totals.targets),
            counts_le=totals.counts_le.cpu(),
            grad_norm=totals.grad_norm.item(),
            batch_size=totals.batch_size,
            # A sum of its own: together with the losses it could change the order in which ranks add these up.
            fp8_rates=self.fp8_counts.rates(self.runtime.summed(self.fp8_counts.take())) if self.fp8_counts else {},
        )
