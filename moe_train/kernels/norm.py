"""RMSNorm of a sum, forward and backward: every number is read once and written once in each.

    y = x + added,  s = 1 / rms(y),  n = y · s · weight
    with g the gradient of n and c = Σ g · weight · y · s / d:
    d_y = s · (g · weight - y · s · c) + what comes along the stream,   d_weight = Σ_rows g · y · s

A row lies in the registers of a program, in FP32, and results are rounded once. The number of programs, and so the
order in which a weight's gradient is summed, depends on the shape alone. Compiled for compute capability 9.0, rows of
1,024 need at most 122 registers a thread and none is spilled. In a step of `base` on an H200 norms and what is added
before and cast after them take 16 ms instead of about 45 (docs/log.md, 2026-11-27).

    rows of width d, not necessarily side by side in x; everything else is contiguous
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_train.kernels.capability import check
from moe_train.kernels.device import narrow, widen
from moe_train.kernels.sums import sum_of

WIDEST = 8192
_ELEMENTS = 2048  # of a block, four warps' worth at 16 a thread; wider rows have more warps
_PROGRAMS = 1024  # of a backward pass at most: their sums of the weight's gradient are some of its traffic
_FEWEST_ROWS = 32  # for a program of a backward pass, for the same reason


@triton.jit
def _columns(D: tl.constexpr):
    """A thread takes four at a time in every format: else BF16 goes by eight, and numbers change hands in between."""
    return tl.max_contiguous(tl.arange(0, D), 4)


@triton.jit(do_not_specialize=["rows"])
def _norm_kernel(
    x_ptr, added_ptr, weight_ptr, scale_ptr, total_ptr, narrow_ptr, exact_ptr, rows, d, stride, eps,
    GIVEN: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """GIVEN: the scales are read, not made. Then nothing is summed, and the norms are those of before to the bit."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = _columns(D)
    inside = (row < rows)[:, None] & (column < d)[None, :]
    place = row.to(tl.int64)[:, None] * d + column[None, :]
    x = widen(tl.load(x_ptr + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0))
    if added_ptr is not None:
        x = x + widen(tl.load(added_ptr + place, mask=inside, other=0.0))
        tl.store(total_ptr + place, x, mask=inside)
    if GIVEN:
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)
    else:
        scale = tl.rsqrt(tl.sum(x * x, 1) / d + eps)
        tl.store(scale_ptr + row, scale, mask=row < rows)
    weight = tl.load(weight_ptr + column, mask=column < d, other=0.0)
    n = x * scale[:, None] * weight[None, :]
    if narrow_ptr is not None:
        tl.store(narrow_ptr + place, narrow(n, narrow_ptr.dtype.element_ty), mask=inside)
    if exact_ptr is not None:
        tl.store(exact_ptr + place, n, mask=inside)


@triton.jit(do_not_specialize=["rows", "blocks"])
def _norm_backward_kernel(
    total_ptr, weight_ptr, scale_ptr, along_ptr, grad_narrow_ptr, grad_exact_ptr, grad_x_ptr, grad_added_ptr, sums_ptr,
    rows, d, stride, blocks, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """A program has `blocks` blocks of R rows, one after the other, and one row of `sums`."""
    program = tl.program_id(0)
    column = _columns(D)
    weight = tl.load(weight_ptr + column, mask=column < d, other=0.0)[None, :]
    grad_weight = tl.zeros((R, D), tl.float32)
    for block in range(blocks):
        row = (program * blocks + block) * R + tl.arange(0, R)
        inside = (row < rows)[:, None] & (column < d)[None, :]
        place = row.to(tl.int64)[:, None] * d + column[None, :]
        total = tl.load(total_ptr + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)[:, None]
        grad = tl.zeros((R, D), tl.float32)
        if grad_narrow_ptr is not None:
            grad = grad + widen(tl.load(grad_narrow_ptr + place, mask=inside, other=0.0))
        if grad_exact_ptr is not None:
            grad = grad + widen(tl.load(grad_exact_ptr + place, mask=inside, other=0.0))
        if along_ptr is not None:  # read here: loads do not pass the sum, for which a program's threads wait
            along = tl.load(along_ptr + place, mask=inside, other=0.0)
        unit = widen(total) * scale
        grad_weight += grad * unit
        grad = grad * weight
        common = (tl.sum(grad * unit, 1) / d)[:, None]
        grad = (grad - unit * common) * scale
        if along_ptr is not None:
            grad = grad + widen(along)
        tl.store(grad_x_ptr + place, narrow(grad, grad_x_ptr.dtype.element_ty), mask=inside)
        if grad_added_ptr is not None:
            tl.store(grad_added_ptr + place, narrow(grad, grad_added_ptr.dtype.element_ty), mask=inside)
    tl.store(sums_ptr + program.to(tl.int64) * d + column, tl.sum(grad_weight, 0), mask=column < d)


def _block(d: int) -> tuple[int, int, int]:
    """Rows and columns of a block, and its warps, for rows of width d. Raises ValueError."""
    check(0 < d <= WIDEST, f"rows of {d} numbers, not 1 to {WIDEST}")
    columns = max(16, int(triton.next_power_of_2(d)))
    rows = max(1, _ELEMENTS // columns)
    return rows, columns, max(1, rows * columns // 512)


def _as_rows(x: Tensor, d: int) -> Tensor:
    """(rows, d), a view where rows are a part of longer ones."""
    check(x.shape[-1:] == (d,), f"rows of {d} numbers, as the weight has")
    rows = x.reshape(-1, d)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def norm_rows(
    x: Tensor,
    added: Tensor | None,
    weight_d: Tensor,
    scale: Tensor,
    *,
    eps: float | None,
    total: Tensor | None,
    narrow: Tensor | None,
    exact: Tensor | None,
) -> None:
    """Writes the norm of x + added (…, d) to `narrow` (any format) and `exact` (FP32), what there is of them.

    scale (…): 1 / rms of every row in FP32, written, or read where `eps` is None. total: the sum, in FP32, written
    where something is added. What is written is contiguous. Raises ValueError.
    """
    d = len(weight_d)
    check((added is None) == (total is None), "a total: where something is added, and there alone")
    rows_nd = _as_rows(x, d)
    r, columns, warps = _block(d)
    if len(rows_nd):
        arguments = (rows_nd, _contiguous(added), weight_d.contiguous(), scale, total, narrow, exact)
        sizes = (len(rows_nd), d, rows_nd.stride(0), 0.0 if eps is None else eps)
        grid = (triton.cdiv(len(rows_nd), r),)
        _norm_kernel[grid](*arguments, *sizes, GIVEN=eps is None, R=r, D=columns, num_warps=warps)


def norm_rows_backward(
    total: Tensor,
    weight_d: Tensor,
    scale: Tensor,
    *,
    along: Tensor | None,
    grad_narrow: Tensor | None,
    grad_exact: Tensor | None,
    grad_x: Tensor,
    grad_added: Tensor | None,
) -> Tensor:
    """Writes the sum's gradient (…, d) in the formats of `grad_x` and, if that is there, of `grad_added`.

    along: the gradient that the sum has from elsewhere. → the weight's gradient (d), FP32. Raises ValueError.
    """
    d = len(weight_d)
    total_nd = _as_rows(total, d)
    r, columns, warps = _block(d)
    all_blocks = triton.cdiv(len(total_nd), r)
    blocks = max(triton.cdiv(_FEWEST_ROWS, r), triton.cdiv(all_blocks, _PROGRAMS))
    programs = triton.cdiv(all_blocks, blocks)
    sums = weight_d.new_empty(programs, d)
    if programs:
        grads = (_contiguous(each) for each in (along, grad_narrow, grad_exact))
        arguments = (total_nd, weight_d.contiguous(), scale, *grads, grad_x, grad_added, sums)
        sizes = (len(total_nd), d, total_nd.stride(0), blocks)
        _norm_backward_kernel[(programs,)](*arguments, *sizes, R=r, D=columns, num_warps=warps)
    return sum_of(sums, torch.float32)
