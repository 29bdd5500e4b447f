"""Clipping without a visit of its own: optimizers whose kernels read gradients multiply them by the coefficient there.

Multiplying all gradients first takes 8 bytes a parameter, beside the 4 of their norm and AdamW's 28. It is left out
where every optimizer of a run takes the coefficient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from moe_train.precision.support import runs_triton


@runtime_checkable
class TakesCoefficient(Protocol):
    """An optimizer that may do so."""

    takes_coefficient: bool  # whether it does, with the parameters it has

    def step(self, closure: None = None, *, coefficient: Tensor | None = None) -> None:
        """coefficient: one FP32 number on the device, for all gradients, which stay as they are."""


def kernels_take(parameters: Iterable[Tensor]) -> bool:
    """Whether the project's Triton kernels step these: FP32, each in one piece, on a device that runs Triton."""
    return all(p.dtype == torch.float32 and p.is_contiguous() and runs_triton(p.device) for p in parameters)


def all_take_coefficient(optimizers: Sequence[torch.optim.Optimizer]) -> bool:
    return all(isinstance(each, TakesCoefficient) and each.takes_coefficient for each in optimizers)


def step(optimizer: torch.optim.Optimizer, coefficient: Tensor | None) -> None:
    """One step, with gradients multiplied by `coefficient` where there is one."""
    if coefficient is None:
        optimizer.step()
    else:
        assert isinstance(optimizer, TakesCoefficient)
        optimizer.step(coefficient=coefficient)
