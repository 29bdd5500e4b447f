"""Partial sums of several programs, added up in an order that the shape alone decides.

torch's sum over 256 rows of 128 takes 7.4 µs on an H200, as long as reading sixty times as much: it leaves most of the
device idle. A program here has few columns and many rows at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_train.kernels.device import narrow

_NUMBERS = 4096  # of a block
_ROWS = 512  # of a block at most, so that 32 bytes of a row are read together


@triton.jit
def _sum_kernel(parts, out, rows, columns, R: tl.constexpr, C: tl.constexpr):
    column = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    total = tl.zeros((R, C), tl.float32)
    for first in range(0, rows, R):
        row = first + tl.arange(0, R)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        total += tl.load(parts + row.to(tl.int64)[:, None] * columns + column[None, :], mask=inside, other=0.0)
    tl.store(out + column, narrow(tl.sum(total, 0), out.dtype.element_ty), mask=column < columns)


def sum_of(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """parts (s, …), contiguous and FP32, over s: in FP32, rounded once to `dtype`."""
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    if out.numel():
        rows = min(_ROWS, triton.next_power_of_2(max(1, len(parts))))
        columns = _NUMBERS // rows
        grid = (triton.cdiv(out.numel(), columns),)
        _sum_kernel[grid](parts, out, len(parts), out.numel(), R=rows, C=columns, num_warps=8)
    return out
