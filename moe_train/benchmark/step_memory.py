"""The most bytes of tensors alive during a step, of one arm among others on the same device."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_train.cost.tensor_peak import TensorPeak


def peak_bytes(step: Callable[[], object], state: Sequence[Tensor], device: torch.device) -> int:
    """What `step` needs at its peak with its `state` (all it holds between steps). A step before must have been made.

    On CUDA the allocator's figure, less what belongs to others; elsewhere every tensor is watched, which takes several
    times the time of the step.
    """
    if device.type == "cuda":
        step()
        gc.collect()  # what another arm left in cycles would be let go meanwhile, and count as given back
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        storages: dict[int, int] = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state}
        needed: int = torch.cuda.max_memory_allocated(device) - before
        return needed + sum(storages.values())
    with TensorPeak(state) as meter:
        step()
    return int(meter.peak)
