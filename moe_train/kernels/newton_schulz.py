"""Muon's iteration for small matrices, one a program, which never leave its core between two steps.

    x ← x / |x|,   then `steps` times   g = x xᵀ,   x ← a x + (b g + c g²) x

Of torch's operations a batch of matrices takes five launches a step, most of which move and copy what fits into
registers: 136 matrices of 96 × 128, four layers' experts, took 0.152 ms in 34 launches on an H200, here 0.055 in one.
Numbers are rounded where those operations round them. Matrices of several shapes share a launch, in which there are
then more for each core.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_train.kernels.capability import card, check
from moe_train.kernels.device import dot, narrow, widen

LARGEST = 128  # of either side
_SHARED_BYTES = 98 * 1024  # two operands of 128 x 128 and what changes hands between threads


class Stack(NamedTuple):
    """Matrices one after the other, from number `first` of a flat tensor on."""

    first: int
    matrices: int
    rows: int
    columns: int

    @property
    def end(self) -> int:
        return self.first + self.matrices * self.rows * self.columns


@triton.jit
def _as_it_lies(numbers, first, rows, columns, R: tl.constexpr, C: tl.constexpr):
    row, column = tl.arange(0, R), tl.arange(0, C)
    at = numbers + first + row[:, None] * columns + column[None, :]
    return at, (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def _place(table_ptr, ALIGNED: tl.constexpr):
    """Of this program's matrix: where it begins, its rows and its columns."""
    row_of_table = table_ptr + tl.program_id(0) * 3
    first, rows, columns = tl.load(row_of_table), tl.load(row_of_table + 1), tl.load(row_of_table + 2)
    if ALIGNED:  # else numbers are read one by one: twice the time of all of it
        first, columns = tl.multiple_of(first, 8), tl.multiple_of(columns, 8)
    return first, rows, columns


@triton.jit
def _orthogonalize_kernel(
    numbers, table_ptr, a, b, c, smallest,
    STEPS: tl.constexpr, ALIGNED: tl.constexpr, S: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """A matrix a program, of which rows are the shorter side (S, padded) while it is worked on."""
    first, rows, columns = _place(table_ptr, ALIGNED)
    if rows > columns:
        at_tall, inside_tall = _as_it_lies(numbers, first, rows, columns, L, S)
        x = tl.trans(tl.load(at_tall, mask=inside_tall, other=0.0))
    else:
        at_wide, inside_wide = _as_it_lies(numbers, first, rows, columns, S, L)
        x = tl.load(at_wide, mask=inside_wide, other=0.0)
    wide = widen(x)
    norm = tl.sqrt(tl.sum(tl.sum(wide * wide, 1), 0))
    norm = widen(narrow(tl.maximum(norm, smallest), x.dtype))
    x = narrow(tl.div_rn(wide, tl.broadcast_to(norm, wide.shape)), x.dtype)
    for _ in range(STEPS):
        gram = narrow(dot(x, tl.trans(x), tl.zeros((S, S), tl.float32)), x.dtype)
        factor = narrow(c * dot(gram, gram, widen(gram) * (b / c)), x.dtype)
        x = narrow(dot(factor, x, a * widen(x)), x.dtype)
    tl.debug_barrier()  # so that addresses are made again: kept, they would take half of the registers
    first, rows, columns = _place(table_ptr, ALIGNED)
    if rows > columns:
        to_tall, inside_tall = _as_it_lies(numbers, first, rows, columns, L, S)
        tl.store(to_tall, tl.trans(x), mask=inside_tall)
    else:
        to_wide, inside_wide = _as_it_lies(numbers, first, rows, columns, S, L)
        tl.store(to_wide, x, mask=inside_wide)


@functools.lru_cache(maxsize=64)
def _table(stacks: tuple[Stack, ...], device: torch.device) -> Tensor:
    """Made once: a copy to the device has no place in a CUDA graph, whose first call is none."""
    found = [
        (first, stack.rows, stack.columns)
        for stack in stacks
        for first in range(stack.first, stack.end, stack.rows * stack.columns)
    ]
    return torch.tensor(found, dtype=torch.int32, device=device)


def takes(numbers: Tensor, rows: int, columns: int) -> bool:
    """Whether matrices of so many rows and columns are small enough, among `numbers` of this format and device."""
    return (
        numbers.dtype in (torch.bfloat16, torch.float16)
        and 0 < min(rows, columns) <= max(rows, columns) <= LARGEST
        and numbers.numel() < 2**31
        and card(numbers.device).shared_bytes >= _SHARED_BYTES
    )


def orthogonalize_(
    numbers: Tensor, stacks: Sequence[Stack], steps: int, coefficients: tuple[float, float, float], smallest: float
) -> None:
    """Each matrix of the stacks by the nearest semi-orthogonal one, in place, as training/muon.py's `orthogonalized`.

    numbers: flat and contiguous, BF16 or FP16. smallest: of a norm. What `takes` takes; raises ValueError.
    """
    check(numbers.dim() == 1 and numbers.is_contiguous(), "numbers: flat and contiguous")
    alike: dict[tuple[int, int], list[Stack]] = defaultdict(list)
    for stack in stacks:
        fits = takes(numbers, stack.rows, stack.columns) and stack.end <= len(numbers)
        check(fits, f"matrices: BF16 or FP16, of 1 to {LARGEST} rows and columns, among the numbers")
        short, long = sorted((stack.rows, stack.columns))
        alike[max(16, triton.next_power_of_2(short)), max(16, triton.next_power_of_2(long))].append(stack)
    for (short, long), together in alike.items():
        if count := sum(stack.matrices for stack in together):
            aligned = numbers.data_ptr() % 16 == 0 and all(s.first % 8 == s.columns % 8 == 0 for s in together)
            arguments = (numbers, _table(tuple(together), numbers.device), *coefficients, smallest)
            sizes = {"STEPS": steps, "ALIGNED": aligned, "S": short, "L": long, "num_warps": 8}
            _orthogonalize_kernel[(count,)](*arguments, **sizes)
