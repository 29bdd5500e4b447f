"""AdamW's step of many tensors, clipping included (arXiv 1711.05101, algorithm 2): two launches, however many they are.

    g = coefficient · gradient
    m ← β₁ m + (1 - β₁) g,   v ← β₂ v + (1 - β₂) g²
    parameter ← parameter - η·decay·parameter - η / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)

Parameters and gradients are FP32, moments FP32 or BF16 (computed in FP32, rounded to the nearest when stored): 28 or 20
bytes a parameter, in one visit. The coefficient and the rate η are read from the device, t is counted there: nothing
waits for the host, and a CUDA graph can be replayed with others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_train.kernels.capability import check
from moe_train.kernels.device import narrow, widen
from moe_train.kernels.tables import are_aligned, find_tensor, last_programs, pointer, table_of

BLOCK = 2048
BLOCKS = 4  # of a program, which finds its tensor once for all of them

# Rows of the table: four addresses, that of the step counter, how many numbers there are, and the first program behind.
_COUNT, _SIZE, _END = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)


@triton.jit(do_not_specialize=["tensors"])
def _corrections_kernel(table_ptr, corrections_ptr, tensors, log_beta1, log_beta2, T: tl.constexpr):
    """One step more for every tensor; 1 / (1 - β₁ᵗ) and 1 / √(1 - β₂ᵗ), in FP64, as 1 - βᵗ is small at first."""
    nth = tl.arange(0, T)
    inside = nth < tensors
    count_ptr = tl.load(table_ptr + _COUNT * tensors + nth, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    count = tl.load(count_ptr, mask=inside, other=0.0) + 1.0
    tl.store(count_ptr, count, mask=inside)
    wide = count.to(tl.float64)
    first = 1.0 / (1.0 - tl.exp(wide * log_beta1))
    second = 1.0 / tl.sqrt(1.0 - tl.exp(wide * log_beta2))
    tl.store(corrections_ptr + nth, first.to(tl.float32), mask=inside)
    tl.store(corrections_ptr + tensors + nth, second.to(tl.float32), mask=inside)


@triton.jit
def _visit(
    parameter_ptr, gradient_ptr, first_ptr, second_ptr, inside,
    coefficient, rate, lost, correction, root, keep1, take1, keep2, take2, eps,
):  # fmt: skip
    """`lost`: of a parameter by decay. `correction`, `root`: what m and √v are multiplied by."""
    gradient = tl.load(gradient_ptr, mask=inside) * coefficient
    parameter = tl.load(parameter_ptr, mask=inside)
    first = widen(tl.load(first_ptr, mask=inside)) * keep1 + gradient * take1
    second = widen(tl.load(second_ptr, mask=inside)) * keep2 + gradient * gradient * take2
    parameter = parameter - parameter * lost
    parameter = parameter - tl.div_rn(first * (rate * correction), tl.sqrt_rn(second) * root + eps)
    tl.store(parameter_ptr, parameter, mask=inside)
    tl.store(first_ptr, narrow(first, first_ptr.dtype.element_ty), mask=inside)
    tl.store(second_ptr, narrow(second, second_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tensors"])
def _adamw_kernel(
    table_ptr, corrections_ptr, rate_ptr, coefficient_ptr, tensors, decay, keep1, take1, keep2, take2, eps,
    MOMENTS: tl.constexpr, ALIGNED: tl.constexpr, T: tl.constexpr, N: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A program has BLOCKS blocks of N numbers of one tensor. T: a power of two, as many as tensors or more."""
    nth, start = find_tensor(table_ptr + _END * tensors, tensors, T, BLOCKS * N)
    numbers = tl.load(table_ptr + _SIZE * tensors + nth)
    parameter_ptr = pointer(table_ptr + nth, tl.float32, ALIGNED)
    gradient_ptr = pointer(table_ptr + tensors + nth, tl.float32, ALIGNED)
    first_ptr = pointer(table_ptr + 2 * tensors + nth, MOMENTS, ALIGNED)
    second_ptr = pointer(table_ptr + 3 * tensors + nth, MOMENTS, ALIGNED)
    correction = tl.load(corrections_ptr + nth)
    root = tl.load(corrections_ptr + tensors + nth)
    rate = tl.load(rate_ptr)
    coefficient = 1.0
    if coefficient_ptr is not None:
        coefficient = tl.load(coefficient_ptr)
    place = tl.max_contiguous(tl.arange(0, N), 4)  # in every format, or BF16 would go by eight and change hands
    for block in range(BLOCKS):
        first_number = start + block * N
        at = first_number + place
        if first_number + N <= numbers:  # no mask: with one a thread's numbers are read one by one
            _visit(
                parameter_ptr + at, gradient_ptr + at, first_ptr + at, second_ptr + at, None,
                coefficient, rate, rate * decay, correction, root, keep1, take1, keep2, take2, eps,
            )  # fmt: skip
        elif first_number < numbers:
            _visit(
                parameter_ptr + at, gradient_ptr + at, first_ptr + at, second_ptr + at, at < numbers,
                coefficient, rate, rate * decay, correction, root, keep1, take1, keep2, take2, eps,
            )  # fmt: skip


def step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    counts: Sequence[Tensor],
    *,
    rate: Tensor,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    coefficient: Tensor | None = None,
) -> None:
    """One step of all `parameters`, with their moments (FP32 or BF16, all alike) and step counters, in place.

    Of one device and contiguous; a tensor's gradient and moments are as large as it is. counts: one FP32 number each.
    rate, coefficient: one FP32 number on the device. Raises ValueError.
    """
    if not parameters:
        return
    device, moments = parameters[0].device, firsts[0].dtype
    of_parameters = (parameters, gradients, firsts, seconds)
    check(len({len(tensors) for tensors in (*of_parameters, counts)}) == 1, "operands: one of each for a parameter")
    for tensors, dtype in zip(of_parameters, (torch.float32, torch.float32, moments, moments), strict=True):
        for tensor, parameter in zip(tensors, parameters, strict=True):
            check(tensor.is_contiguous() and tensor.numel() == parameter.numel(), "operands: contiguous, of one size")
            check(tensor.dtype == dtype, "parameters and gradients: FP32; moments: of one format")
    check(moments in (torch.float32, torch.bfloat16), "moments: FP32 or BF16")
    numbers = [rate, *counts, *([] if coefficient is None else [coefficient])]
    check(
        all(x.dtype == torch.float32 and x.numel() == 1 for x in numbers), "rate, coefficient, counts: FP32, one each"
    )
    check(all(x.device == device for x in (*numbers, *gradients, *firsts, *seconds)), "operands: of one device")

    addresses = [tensor.data_ptr() for tensors in of_parameters for tensor in tensors]
    sizes = [parameter.numel() for parameter in parameters]
    ends = last_programs(sizes, BLOCK * BLOCKS)
    table = table_of((addresses, [count.data_ptr() for count in counts], sizes, ends), device)
    corrections = torch.empty(2 * len(parameters), device=device)
    places = triton.next_power_of_2(len(parameters))
    logs = [math.log(beta) if beta else -math.inf for beta in betas]
    _corrections_kernel[(1,)](table, corrections, len(parameters), *logs, T=places)
    if ends[-1]:
        shares = (share for beta in betas for share in (beta, 1 - beta))  # of FP64: 1 - β would be off in FP32
        _adamw_kernel[(ends[-1],)](
            *(table, corrections, rate, coefficient, len(parameters), decay, *shares, eps),
            MOMENTS=tl.bfloat16 if moments == torch.bfloat16 else tl.float32,
            ALIGNED=are_aligned(addresses),
            T=places,
            N=BLOCK,
            BLOCKS=BLOCKS,
            num_warps=8,
        )
