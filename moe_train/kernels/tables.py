"""Many tensors in one launch: where they lie is a table on the device, a row a property and a column a tensor.

It is written anew in every step, since gradients are somewhere else each time. Its numbers travel as arguments of
torch's kernels, which a CUDA graph keeps; a copy would read the host's memory again at every replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

_VECTOR = 16  # bytes that a thread reads at once, where all tensors begin at a multiple of them


@triton.jit
def find_tensor(ends_ptr, tensors, T: tl.constexpr, SPAN: tl.constexpr):
    """Which tensor the program has SPAN numbers of, and the first of these. T: a power of two, as many or more."""
    program, index = tl.program_id(0), tl.arange(0, T)
    ends = tl.load(ends_ptr + index, mask=index < tensors, other=2**62)
    before = ends <= program
    return tl.sum(before.to(tl.int32), 0), (program - tl.max(tl.where(before, ends, 0), 0)) * SPAN


@triton.jit
def pointer(table_ptr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address that stands there."""
    found = tl.load(table_ptr).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


def table_of(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """The table, flat: int64."""
    table = torch.zeros(sum(map(len, rows)), dtype=torch.int64, device=device)
    torch._foreach_add_(table.unbind(), [number for row in rows for number in row])
    return table


def last_programs(sizes: Sequence[int], span: int) -> list[int]:
    """Of each tensor of so many numbers, the first program behind it."""
    return list(accumulate(triton.cdiv(size, span) for size in sizes))


def are_aligned(addresses: Sequence[int]) -> bool:
    return all(address % _VECTOR == 0 for address in addresses)
