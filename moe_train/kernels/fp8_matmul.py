"""Grouped products of FP8 operands with a scale for every row and 128 of the inner dimension.

A block of the result is summed in FP32: after 128 products the tensor core's sum is multiplied by the scales of its row
and its column and added, which is also where Hopper's narrow sums have to end (arXiv 2412.19437, section 3.3.2). Where
there is no FP8 hardware the operands become FP16 in registers, which is exact, and are multiplied as such.

No host synchronisation: as many programs start as the groups could need; each finds its group on the device. Programs
of the same rows follow one another, so that these are read from memory once. On an H200 393,216 rows of 96 experts,
1,024 in and 512 out, take 0.56 ms (737 TFLOP/s) and their weight gradients 0.62, where BF16 takes 0.74 and 0.70.

    n rows of all groups, k inner, e groups, o outputs, i inputs, p pieces
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_train.kernels.capability import card, check
from moe_train.kernels.device import decode, narrow
from moe_train.kernels.layouts import PIECE, Columns, Rows, Weights
from moe_train.kernels.pieces import pieces, rows_of


class _Tile(NamedTuple):
    """Rows and columns of a block of the result, and how it is worked on."""

    rows: int
    columns: int
    warps: int
    stages: int
    ahead: bool = False  # a weight gradient's scales are read a piece before they are multiplied with


def _tile(device: torch.device, one_column_scale: bool, few_rows: bool = False) -> _Tile:
    """128 x 128, fewer rows where groups are small, fewer columns where a thread's 255 registers would not do.

    Those run out where operands become FP16 in registers, and on 10.0, where a thread holds whole rows of the result,
    unless one scale does for all columns. A stage holds 128 bytes of each row and column: three take 96 KB at most.

    On 9.0 64 x 128 was the fastest of eight: two programs fit beside each other, one multiplies while the other adds
    up. Scales read ahead cost products a tenth and spare weight gradients a sixth (docs/log.md, 2026-11-27).
    """
    here = card(device)
    roomy = here.shared_bytes > 128 * 1024
    if roomy and here.multiplies_fp8 and not here.threads_hold_rows:  # 9.0
        return _Tile(64, 128, warps=4, stages=3, ahead=True)
    wide = here.multiplies_fp8 and (one_column_scale or not here.threads_hold_rows)
    return _Tile(64 if few_rows else 128, 128 if wide else 64, warps=4 if few_rows else 8, stages=4 if roomy else 3)


@triton.jit
def _dot(left, right, LEFT_E4M3: tl.constexpr, RIGHT_E4M3: tl.constexpr, NATIVE: tl.constexpr):
    """FP8 numbers (m, 128) times FP8 numbers (128, n), where they are not NATIVE as bytes → FP32.

    Called FP8 after they are read, bytes would go through registers on their way to the tensor cores.
    """
    if NATIVE:
        found = tl.dot(left, right, out_dtype=tl.float32)
    else:
        found = tl.dot(decode(left, LEFT_E4M3), decode(right, RIGHT_E4M3), out_dtype=tl.float32)
    return found


@triton.jit
def _grouped_product_kernel(
    left, left_scales, source_ptr, right, right_scales, piece_ptr, out, k, o, groups,
    left_stride, right_stride_e, right_stride_o, right_stride_k, scale_stride_e, scale_stride_o, scale_stride_k,
    LEFT_E4M3: tl.constexpr, RIGHT_E4M3: tl.constexpr, SHARED_ROWS: tl.constexpr, EVEN_K: tl.constexpr,
    NATIVE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(o, N)
    group, start, end = rows_of(piece_ptr, tl.program_id(0) // across)
    if group <= groups:
        row = start + tl.arange(0, M)
        column = (tl.program_id(0) % across) * N + tl.arange(0, N)
        inner = tl.arange(0, 128)
        # Rows and columns beyond the edge are read as some inside it, and not written.
        near_row = tl.minimum(row, end - 1).to(tl.int64)
        if source_ptr is not None:
            near_row = tl.load(source_ptr + near_row)
        near_column = (column % o).to(tl.int64)
        expert = group.to(tl.int64)
        left_at = left + near_row[:, None] * left_stride + inner[None, :]
        right_at = right + expert * right_stride_e
        right_at += near_column[None, :] * right_stride_o + inner[:, None] * right_stride_k
        left_scale_at = left_scales + near_row * tl.cdiv(k, 128)
        right_scale_at = right_scales + expert * scale_stride_e
        if SHARED_ROWS:
            right_scale_at += ((tl.program_id(0) % across) * N).to(tl.int64) * scale_stride_o
        else:
            right_scale_at += near_column * scale_stride_o
        total = tl.zeros((M, N), dtype=tl.float32)
        # Behind the last group there is nothing to add: those rows are zero.
        for block in range(0, tl.where(group < groups, tl.cdiv(k, 128), 0)):
            if EVEN_K:
                x = tl.load(left_at)
                w = tl.load(right_at)
            else:
                inside = inner < k - block * 128
                x = tl.load(left_at, mask=inside[None, :], other=0.0)
                w = tl.load(right_at, mask=inside[:, None], other=0.0)
            scale = tl.load(left_scale_at + block)
            other = tl.load(right_scale_at + block * scale_stride_k)
            found = _dot(x, w, LEFT_E4M3, RIGHT_E4M3, NATIVE)
            if SHARED_ROWS:
                total += found * (scale * other)[:, None]
            else:
                total += found * (scale[:, None] * other[None, :])
            left_at += 128
            right_at += 128 * right_stride_k
        place = row.to(tl.int64)[:, None] * o + column[None, :]
        tl.store(out + place, narrow(total, out.dtype.element_ty), mask=(row < end)[:, None] & (column < o)[None, :])


@triton.jit
def _weight_kernel(
    left, left_scales, right, right_scales, piece_ends, out, o, i, left_pieces, right_pieces,
    left_scale_stride_o, left_scale_stride_p, right_scale_stride_i, right_scale_stride_p,
    LEFT_E4M3: tl.constexpr, RIGHT_E4M3: tl.constexpr, NATIVE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(i, N)
    tiles = tl.cdiv(o, M) * across
    group = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    row = (tile // across) * M + tl.arange(0, M)
    column = (tile % across) * N + tl.arange(0, N)
    inner = tl.arange(0, 128)
    start = tl.load(piece_ends + group - 1, mask=group > 0, other=0)
    end = tl.load(piece_ends + group)
    near_row = (row % o).to(tl.int64)
    near_column = (column % i).to(tl.int64)
    left_at = left + near_row[:, None] * (left_pieces * 128) + start.to(tl.int64) * 128 + inner[None, :]
    right_at = right + near_column[None, :] * (right_pieces * 128) + start.to(tl.int64) * 128 + inner[:, None]
    left_scale_at = left_scales + near_row * left_scale_stride_o + start.to(tl.int64) * left_scale_stride_p
    right_scale_at = right_scales + near_column * right_scale_stride_i + start.to(tl.int64) * right_scale_stride_p
    total = tl.zeros((M, N), dtype=tl.float32)
    if AHEAD:
        scale = tl.load(left_scale_at, mask=row * 0 + start < end, other=0.0)
        other = tl.load(right_scale_at, mask=column * 0 + start < end, other=0.0)
    for piece in range(start, end):
        x = tl.load(left_at)
        y = tl.load(right_at)
        if AHEAD:
            left_scale_at += left_scale_stride_p
            right_scale_at += right_scale_stride_p
            next_scale = tl.load(left_scale_at, mask=row * 0 + piece + 1 < end, other=0.0)
            next_other = tl.load(right_scale_at, mask=column * 0 + piece + 1 < end, other=0.0)
            total += _dot(x, y, LEFT_E4M3, RIGHT_E4M3, NATIVE) * (scale[:, None] * other[None, :])
            scale, other = next_scale, next_other
        else:
            scale = tl.load(left_scale_at)
            other = tl.load(right_scale_at)
            total += _dot(x, y, LEFT_E4M3, RIGHT_E4M3, NATIVE) * (scale[:, None] * other[None, :])
            left_scale_at += left_scale_stride_p
            right_scale_at += right_scale_stride_p
        left_at += 128
        right_at += 128
    place = (group.to(tl.int64) * o + row)[:, None] * i + column[None, :]
    tl.store(out + place, narrow(total, out.dtype.element_ty), mask=(row < o)[:, None] & (column < i)[None, :])


def _operand(values: Tensor, native: bool) -> Tensor:
    return values if native else values.view(torch.uint8)


def grouped_product(
    left: Rows, right: Weights, ends_e: Tensor, dtype: torch.dtype, source_n: Tensor | None = None
) -> Tensor:
    """Rows of group e (n, k), which end before `ends_e[e]`, times right[e] (o, k) transposed → (n, o) in `dtype`.

    source_n (int64): row i is row source_n[i] of left. Rows behind the last group are zero. Raises ValueError.
    """
    k = left.values.shape[1]
    n = len(left.values if source_n is None else source_n)
    e, o, inner = right.values.shape
    check(inner == k, f"operands: the inner dimensions are {k} and {inner}")
    check(len(ends_e) == e and ends_e.dtype == torch.int32, f"ends_e: int32, {e} of them")
    check(left.values.stride(1) == 1 and left.scales.is_contiguous(), "left: rows whose numbers follow one another")
    out = left.values.new_empty((n, o), dtype=dtype)
    check(source_n is None or source_n.dtype == torch.int64, "source_n: int64")
    native = card(out.device).multiplies_fp8
    tile = _tile(out.device, few_rows=n <= 64 * e, one_column_scale=right.shared_rows)
    tiles = n // tile.rows + min(n, e + 1)
    if out.numel():
        _grouped_product_kernel[(tiles * triton.cdiv(o, tile.columns),)](
            _operand(left.values, native),
            left.scales,
            None if source_n is None else source_n.contiguous(),
            _operand(right.values, native),
            right.scales,
            pieces(ends_e, n, tile.rows, tiles)[0],
            out,
            k,
            o,
            e,
            left.values.stride(0),
            *right.values.stride(),
            *right.scales.stride(),
            LEFT_E4M3=left.values.dtype == torch.float8_e4m3fn,
            RIGHT_E4M3=right.values.dtype == torch.float8_e4m3fn,
            SHARED_ROWS=right.shared_rows,
            EVEN_K=k % PIECE == 0,
            NATIVE=native,
            M=tile.rows,
            N=tile.columns,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out


def grouped_weight_product(left: Columns, right: Columns, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """(o, tokens) times (i, tokens) transposed, over the tokens of each group → (e, o, i).

    Both have the same groups. A group without tokens gives zeros. Raises ValueError.
    """
    o, i, e = len(left.values), len(right.values), len(left.ends_e)
    pieces = left.scales.shape[1], right.scales.shape[1]
    for operand in (left, right):
        check(operand.values.is_contiguous(), "operands: contiguous")
        check(operand.values.shape[1] == PIECE * operand.scales.shape[1], "operands: whole pieces of 128 tokens")
    check(len(right.ends_e) == e, "operands: the same groups")
    out = left.values.new_empty((e, o, i), dtype=out_dtype)
    native = card(out.device).multiplies_fp8
    tile = _tile(out.device, one_column_scale=False)
    if out.numel():
        _weight_kernel[(e * triton.cdiv(o, tile.rows) * triton.cdiv(i, tile.columns),)](
            _operand(left.values, native),
            left.scales,
            _operand(right.values, native),
            right.scales,
            left.ends_e,
            out,
            o,
            i,
            *pieces,
            *left.scales.stride(),
            *right.scales.stride(),
            LEFT_E4M3=left.values.dtype == torch.float8_e4m3fn,
            RIGHT_E4M3=right.values.dtype == torch.float8_e4m3fn,
            NATIVE=native,
            M=tile.rows,
            N=tile.columns,
            AHEAD=tile.ahead,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out
