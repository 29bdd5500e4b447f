"""What Muon does to each number beside its products: the momentum and the direction before them, the update after.

    g         = coefficient · gradient, where gradients are clipped
    momentum  ← momentum + (1 - β)(g - momentum)
    direction = g + β (momentum - g), or momentum
    parameter ← (1 - η·decay) parameter - η·scale·update

In FP32, one visit each: 14 and 10 bytes a number, where torch's operations took about 60 (docs/log.md). The learning
rate η and the coefficient are read from the device, so that a CUDA graph can be replayed with others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_train.kernels.capability import check
from moe_train.kernels.device import narrow, widen

BLOCK = 2048


@triton.jit
def _places(N: tl.constexpr):
    """Four to a thread in every format, or BF16 would go by eight and change hands through shared memory."""
    return tl.max_contiguous(tl.arange(0, N), 4)


@triton.jit
def _direction_kernel(gradient, momentum, out, coefficient_ptr, numbers, beta, NESTEROV: tl.constexpr, N: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * N + _places(N)
    inside = at < numbers
    grad = tl.load(gradient + at, mask=inside, other=0.0)
    if coefficient_ptr is not None:
        grad = grad * tl.load(coefficient_ptr)
    mean = tl.load(momentum + at, mask=inside, other=0.0)
    mean += (1.0 - beta) * (grad - mean)
    tl.store(momentum + at, mean, mask=inside)
    way = grad + beta * (mean - grad) if NESTEROV else mean
    tl.store(out + at, narrow(way, out.dtype.element_ty), mask=inside)


@triton.jit
def _update_kernel(parameter, update, rate_ptr, numbers, decay, scale, N: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * N + _places(N)
    inside = at < numbers
    rate = tl.load(rate_ptr)
    kept = tl.load(parameter + at, mask=inside, other=0.0) * (1.0 - rate * decay)
    moved = widen(tl.load(update + at, mask=inside, other=0.0))
    tl.store(parameter + at, kept - (rate * scale) * moved, mask=inside)


def direction(
    gradient: Tensor, momentum: Tensor, beta: float, nesterov: bool, out: Tensor, coefficient: Tensor | None = None
) -> None:
    """Update `momentum` (FP32, as is `gradient`) and write the direction into `out` (FP32 or BF16).

    All contiguous and of as many numbers. coefficient: one FP32 number on the device. Raises ValueError.
    """
    for tensor in (gradient, momentum, out):
        check(tensor.is_contiguous() and tensor.numel() == out.numel(), "operands: contiguous, of one size")
    check(gradient.dtype == momentum.dtype == torch.float32, "gradient and momentum: FP32")
    one = coefficient is None or (coefficient.dtype == torch.float32 and coefficient.numel() == 1)
    check(one, "coefficient: one FP32 number")
    if numbers := out.numel():
        grid = (triton.cdiv(numbers, BLOCK),)
        arguments = (gradient, momentum, out, coefficient, numbers, beta)
        # Not fused into what follows, the product with the coefficient is the gradient that was multiplied before.
        _direction_kernel[grid](*arguments, NESTEROV=nesterov, N=BLOCK, num_warps=8, enable_fp_fusion=False)


def update(parameter: Tensor, moved: Tensor, rate: Tensor, decay: float, scale: float) -> None:
    """`parameter` (FP32) as above, in place; `moved` in FP32 or BF16; `rate` η, one FP32 number on the device.

    Contiguous and of as many numbers. Raises ValueError.
    """
    check(parameter.dtype == rate.dtype == torch.float32 and rate.numel() == 1, "parameter and rate: FP32, one rate")
    check(parameter.is_contiguous() and moved.is_contiguous(), "operands: contiguous")
    check(parameter.numel() == moved.numel(), "operands: of one size")
    if numbers := parameter.numel():
        grid = (triton.cdiv(numbers, BLOCK),)
        _update_kernel[grid](parameter, moved, rate, numbers, decay, scale, N=BLOCK, num_warps=8)
