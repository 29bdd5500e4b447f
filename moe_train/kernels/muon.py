"""What Muon does to each number beside its products: the momentum and the direction before them, the update after.

    g         = coefficient · gradient, where gradients are clipped
    momentum  ← momentum + (1 - β)(g - momentum)
    direction = g + β (momentum - g), or momentum
    parameter ← (1 - η·decay) parameter - η·scale·update

In FP32, one visit each: 14 and 10 bytes a number, where torch's operations took about 60 (docs/log.md), and one launch
each for many parameters, of whatever shapes: of a small model a launch is all that a parameter takes. The learning rate
η and the coefficient are read from the device, so that a CUDA graph can be replayed with others.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_train.kernels.capability import check
from moe_train.kernels.device import narrow, widen
from moe_train.kernels.tables import are_aligned, find_tensor, last_programs, pointer, table_of

BLOCK = 2048
BLOCKS = 4  # of a program, which finds its tensor once for all of them

# Rows of the table: three addresses, how many numbers come before, how many there are, the first program behind, and
# the bits of the scale in FP32.
_GRADIENT, _MOMENTUM, _FIRST = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_SIZE, _END, _SCALE = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)


@triton.jit
def _places(N: tl.constexpr):
    """Four to a thread in every format, or BF16 would go by eight and change hands through shared memory."""
    return tl.max_contiguous(tl.arange(0, N), 4)


@triton.jit
def _beside(base, table_ptr, ALIGNED: tl.constexpr):
    """Where the numbers of a tensor begin among those of all."""
    first = tl.load(table_ptr)
    if ALIGNED:
        first = tl.multiple_of(first, 8)
    return base + first


@triton.jit
def _direct(gradient_ptr, momentum_ptr, out_ptr, inside, coefficient_ptr, beta, NESTEROV: tl.constexpr):
    gradient = tl.load(gradient_ptr, mask=inside)
    if coefficient_ptr is not None:
        gradient = gradient * tl.load(coefficient_ptr)
    mean = tl.load(momentum_ptr, mask=inside)
    mean += (1.0 - beta) * (gradient - mean)
    tl.store(momentum_ptr, mean, mask=inside)
    way = gradient + beta * (mean - gradient) if NESTEROV else mean
    tl.store(out_ptr, narrow(way, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tensors"])
def _direction_kernel(
    table_ptr, out_ptr, coefficient_ptr, tensors, beta,
    NESTEROV: tl.constexpr, ALIGNED: tl.constexpr, T: tl.constexpr, N: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    nth, start = find_tensor(table_ptr + _END * tensors, tensors, T, BLOCKS * N)
    numbers = tl.load(table_ptr + _SIZE * tensors + nth)
    gradient = pointer(table_ptr + _GRADIENT * tensors + nth, tl.float32, ALIGNED)
    momentum = pointer(table_ptr + _MOMENTUM * tensors + nth, tl.float32, ALIGNED)
    out = _beside(out_ptr, table_ptr + _FIRST * tensors + nth, ALIGNED)
    for block in range(BLOCKS):
        first_number = start + block * N
        at = first_number + _places(N)
        if first_number + N <= numbers:  # no mask: with one a thread's numbers are read one by one
            _direct(gradient + at, momentum + at, out + at, None, coefficient_ptr, beta, NESTEROV)
        elif first_number < numbers:
            _direct(gradient + at, momentum + at, out + at, at < numbers, coefficient_ptr, beta, NESTEROV)


@triton.jit
def _move(parameter_ptr, update_ptr, inside, kept, step):
    parameter = tl.load(parameter_ptr, mask=inside) * kept
    tl.store(parameter_ptr, parameter - step * widen(tl.load(update_ptr, mask=inside)), mask=inside)


@triton.jit(do_not_specialize=["tensors"])
def _update_kernel(
    table_ptr, update_ptr, rate_ptr, tensors, decay,
    ALIGNED: tl.constexpr, T: tl.constexpr, N: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    nth, start = find_tensor(table_ptr + _END * tensors, tensors, T, BLOCKS * N)
    numbers = tl.load(table_ptr + _SIZE * tensors + nth)
    parameter = pointer(table_ptr + nth, tl.float32, ALIGNED)
    update = _beside(update_ptr, table_ptr + _FIRST * tensors + nth, ALIGNED)
    rate = tl.load(rate_ptr)
    scale = tl.load(table_ptr + _SCALE * tensors + nth).to(tl.int32).to(tl.float32, bitcast=True)
    kept, step = 1.0 - rate * decay, rate * scale
    for block in range(BLOCKS):
        first_number = start + block * N
        at = first_number + _places(N)
        if first_number + N <= numbers:
            _move(parameter + at, update + at, None, kept, step)
        elif first_number < numbers:
            _move(parameter + at, update + at, at < numbers, kept, step)


class Matrices(NamedTuple):
    """Parameters of one optimizer on the device, with their gradients and momenta, as the kernels find them."""

    table: Tensor
    tensors: int
    numbers: int
    programs: int
    aligned: bool

    @classmethod
    def of(
        cls,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        momenta: Sequence[Tensor],
        scales: Sequence[float],
    ) -> Matrices:
        """In FP32 and contiguous, a parameter's gradient and momentum as large as it is. Raises ValueError."""
        addresses = []
        for tensors in (parameters, gradients, momenta):
            for tensor, parameter in zip(tensors, parameters, strict=True):
                check(
                    tensor.is_contiguous() and tensor.numel() == parameter.numel(), "operands: contiguous, of one size"
                )
                check(tensor.dtype == torch.float32, "parameters, gradients and momenta: FP32")
            addresses.append([tensor.data_ptr() for tensor in tensors])
        sizes = [parameter.numel() for parameter in parameters]
        firsts, ends = [0, *accumulate(sizes)], last_programs(sizes, BLOCK * BLOCKS)
        aligned = are_aligned([address for row in addresses for address in row]) and all(
            f % 8 == 0 for f in firsts[:-1]
        )
        bits = np.asarray(scales, np.float32).view(np.int32).tolist()
        table = table_of((*addresses, firsts[:-1], sizes, ends, bits), parameters[0].device)
        return cls(table, len(parameters), firsts[-1], ends[-1], aligned)

    def _sizes(self, beside: Tensor) -> dict[str, int | bool]:
        """beside: what lies one after the other, in FP32 or BF16."""
        check(beside.is_contiguous() and beside.numel() == self.numbers, "directions and updates: contiguous, of all")
        aligned = self.aligned and are_aligned([beside.data_ptr()])
        places = triton.next_power_of_2(self.tensors)
        return {"ALIGNED": aligned, "T": places, "N": BLOCK, "BLOCKS": BLOCKS, "num_warps": 8}

    def direct(self, out: Tensor, beta: float, nesterov: bool, coefficient: Tensor | None = None) -> None:
        """Update the momenta and write the directions into `out`, one after the other.

        coefficient: one FP32 number on the device. Raises ValueError.
        """
        one = coefficient is None or (coefficient.dtype == torch.float32 and coefficient.numel() == 1)
        check(one, "coefficient: one FP32 number")
        sizes = self._sizes(out)
        if self.programs:
            # Not fused into what follows, the product with the coefficient is the gradient that was multiplied before.
            arguments = (self.table, out, coefficient, self.tensors, beta)
            _direction_kernel[(self.programs,)](*arguments, NESTEROV=nesterov, enable_fp_fusion=False, **sizes)

    def update(self, moved: Tensor, rate: Tensor, decay: float) -> None:
        """Parameters as above, in place, by `moved`, one after the other; `rate` η, one FP32 number on the device."""
        check(rate.dtype == torch.float32 and rate.numel() == 1, "rate: one FP32 number")
        sizes = self._sizes(moved)
        if self.programs:
            _update_kernel[(self.programs,)](self.table, moved, rate, self.tensors, decay, **sizes)
