"""Muon's step of many small matrices by muon.c, each in the cache of a core."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.kernels.cpu import library

_LARGEST = 2**18  # of a matrix, which one core works on: what it needs has to fit into its cache


@dataclass(frozen=True)
class Step:
    """`keep`: of the momentum. `learn`: the learning rate times the update's scale. `decay`: a weight's rest."""

    keep: float
    nesterov: bool
    steps: int
    learn: float
    decay: float


class _Arguments(ctypes.Structure):
    """`Muon` in muon.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("matrices", "rows", "columns")),
        *((name, ctypes.c_void_p) for name in ("next", "gradient", "momentum", "parameter")),
        *((name, ctypes.c_int64) for name in ("steps", "nesterov")),
        *((name, ctypes.c_float) for name in ("keep", "learn", "decay")),
    ]


def takes(tensors: Sequence[Tensor], shape: tuple[int, int]) -> bool:
    """Whether they are used, and can do it: in FP32 on a CPU, matrices of even sizes, small enough.

    tensors: parameters, gradients and momenta, made of matrices of `shape`. Not asked: whether there is a matrix for
    each core, or a run would learn differently with another number of cores.
    """
    return (
        library.in_use() is not None
        and all(x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous() for x in tensors)
        and shape[0] % 2 == shape[1] % 2 == 0
        and shape[0] * shape[1] <= _LARGEST
    )


def step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    shape: tuple[int, int],
    how: Step,
) -> None:
    """All matrices of `shape` that parameters are made of, and their momenta, in place."""
    rows, columns = shape
    places = [
        torch.cat([x.data_ptr() + torch.arange(0, 4 * x.numel(), 4 * rows * columns) for x in tensors])
        for tensors in (gradients, momenta, parameters)
    ]
    arguments = _Arguments(
        *(len(places[0]), rows, columns),
        *(None, *(x.data_ptr() for x in places)),
        *(how.steps, how.nesterov, how.keep, how.learn, how.decay),
    )
    library.call_on_cores("muon_step", arguments)
