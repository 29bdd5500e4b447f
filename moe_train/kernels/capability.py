"""What a device does for the kernels: what of FP8 is in hardware, and how much fits beside a core.

    compute capability   FP8 in hardware             shared memory of a block
    8.0                  no                          163 KB
    8.6                  no                           99 KB
    8.9                  products                     99 KB
    9.0, 10.0            products and rounding       227 KB
    12.0                 products and rounding        99 KB

(CUDA C++ programming guide, "Compute capabilities".) 8.9 rounds in hardware too, but not every Triton goes straight
from FP32 there: over FP16 a number is rounded twice, which changes some. Elsewhere FP8 is integer arithmetic.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Card(NamedTuple):
    rounds_fp8: bool
    multiplies_fp8: bool
    shared_bytes: int  # that one block of threads can have
    threads_hold_rows: bool  # of a product, not pieces of several: results come from tensor memory
    copies_blocks: bool  # of tensors into shared memory, whence warps multiply (TMA and wgmma)


INTERPRETED = Card(
    rounds_fp8=False, multiplies_fp8=False, shared_bytes=99 * 1024, threads_hold_rows=False, copies_blocks=False
)


@functools.cache
def of_capability(capability: tuple[int, int]) -> Card:
    """What devices of compute capability (major, minor) do."""
    shared = {(8, 0): 163, (9, 0): 227, (10, 0): 227}.get(capability, 99)
    rounds, multiplies = capability >= (9, 0), capability >= (8, 9)
    return Card(
        rounds, multiplies, shared * 1024, threads_hold_rows=capability[0] == 10, copies_blocks=capability == (9, 0)
    )


@functools.cache
def _of_device(index: int) -> Card:
    return of_capability(torch.cuda.get_device_capability(index))


def card(device: torch.device) -> Card:
    """What `device` (CUDA, or a CPU where Triton interprets) does in hardware."""
    if device.type != "cuda":
        return INTERPRETED
    return _of_device(torch.cuda.current_device() if device.index is None else device.index)


def cores(device: torch.device) -> int:
    """Of `device`. Where Triton interprets, one program after another, it is 2."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def check(condition: bool, what: str) -> None:
    """Raises ValueError with `what` a kernel asks of its operands."""
    if not condition:
        raise ValueError(what)
