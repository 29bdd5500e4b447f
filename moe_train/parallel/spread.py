"""A model spread over the processes of a run, as a training step and its optimizers meet it.

`Replicated` is one process, or several that each have all of it (torch's DistributedDataParallel through accelerate);
`Sharded` (sharded.py) everything else. Optimizers get what this process holds as plain tensors, so none of them knows
of processes; where a matrix has to be whole for a moment, whole_matrices.py sees to it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moe_train.model.transformer import Losses, Transformer
from moe_train.parallel.whole_matrices import Copies, WholeMatrices


class Part(NamedTuple):
    """Rows of a weight along its first dimension, and of whatever an optimizer keeps for it."""

    shape: torch.Size  # of the whole
    first: int
    end: int

    def of(self, whole: Tensor) -> Tensor:
        return whole[self.first : self.end]


class Parts(Protocol):
    """What a process holds of a model."""

    def local(self, name: str) -> nn.Parameter:
        """What an optimizer gets for a parameter of the model."""

    def part(self, name: str) -> Part:
        """Which part of a parameter that is."""

    def as_saved(self, name: str, local: Tensor) -> Tensor:
        """`local`, of the shape of what an optimizer has of a parameter, for torch.distributed.checkpoint."""


class Clipping(NamedTuple):
    """A gradient's norm, the same on all processes, and what is left to multiply it by: numbers on the device."""

    norm: Tensor  # before clipping
    coefficient: Tensor | None  # None: it is multiplied


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """As torch.nn.utils.clip_grad_norm_ has it."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


class Spread(Parts, Protocol):
    """The same, and how gradients come together."""

    loss_scale: float  # of a process's loss, for gradients that are sums over the processes
    whole_matrices: WholeMatrices | None  # for an optimizer that needs them, where a process has parts
    copies: Copies | None  # for the same, where several processes have a matrix and one does for all of them

    def wrapped(self, *inputs: object) -> Losses:
        """The model's forward pass, in the compute format."""

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch, forward and backward; after a step's last one gradients are complete."""

    def clip(self, max_norm: float, *, multiply: bool) -> Clipping:
        """Scale the gradient down to a norm of max_norm, or leave it as it is and say what would."""

    def release_gradients(self) -> None:
        """After the optimizers have let go of theirs."""


class Whole:
    """All of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters())

    def local(self, name: str) -> nn.Parameter:
        return self._parameters[name]

    def part(self, name: str) -> Part:
        whole = self._parameters[name]
        return Part(whole.shape, 0, len(whole))

    def as_saved(self, name: str, local: Tensor) -> Tensor:
        return local


def shares_copies(device: torch.device) -> bool:
    """Whether processes share out what is done to matrices that all of them have, and send each other the results.

    A number takes about 15 FLOPs for each row of the smaller side, and two bytes or four to send. On CPUs that pays;
    on GPUs over NVLink alone, and little there (docs/log.md, 2026-11-26).
    """
    return device.type == "cpu"


class Replicated(Whole):
    """Every process has the whole model."""

    whole_matrices: WholeMatrices | None = None

    def __init__(self, model: Transformer, accelerator: Accelerator) -> None:
        super().__init__(model.to(accelerator.device))
        processes = accelerator.num_processes
        # One process has nothing to prepare, and accelerate would load what cuts models to see that this one is whole.
        self._prepared: nn.Module = accelerator.prepare(model) if processes > 1 else model
        if isinstance(self._prepared, DistributedDataParallel) != (processes > 1):
            raise RuntimeError(f"accelerate prepared a {type(self._prepared).__name__} for {processes} processes")
        self.loss_scale = float(processes)  # DDP averages gradients
        self._accelerator = accelerator
        self.copies = None
        if processes > 1 and shares_copies(accelerator.device):
            assert dist.group.WORLD is not None
            self.copies = Copies(dict.fromkeys(model.parameters(), dist.group.WORLD))

    def wrapped(self, *inputs: object) -> Losses:
        with self._accelerator.autocast():
            losses: Losses = self._prepared(*inputs)
        return losses

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self._accelerator.no_sync(self._prepared)

    def clip(self, max_norm: float, *, multiply: bool) -> Clipping:
        if multiply:
            return Clipping(nn.utils.clip_grad_norm_(self._parameters.values(), max_norm), None)
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters.values() if p.grad is not None])
        return Clipping(norm, clip_coefficient(norm, max_norm))

    def release_gradients(self) -> None:
        pass
