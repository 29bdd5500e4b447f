"""Grouped products in BF16, FP16 and FP32 without host synchronisation, where torch has none (before 9.0, and 12.0).

Sums are in FP32 and rounded once. As many programs start as the groups could need. Which rows of which group each has
is found on the device by a small kernel before: within the product, finding it takes as long as many a block's sums.
Programs of the same rows follow one another. FP32 is multiplied as FP32, not as TF32. Rows may be read where an index
says they are, so that rows of tokens, once for each of their experts, need not be copied.

On compute capability 9.0 most BF16 and FP16 products are grouped_hopper.py's, where figures of both stand; with other
strides and sizes, few rows a group, or weight gradients without an index they are made here.

    n rows of all groups, k inner, e groups, o outputs, i inputs
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_train.kernels import grouped_hopper
from moe_train.kernels.capability import card, check, cores
from moe_train.kernels.device import dot, narrow
from moe_train.kernels.pieces import pieces, rows_of
from moe_train.kernels.sums import sum_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Tile(NamedTuple):
    """A block of the result, how much of the inner dimension is read at a time, and how it is worked on."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def _tile(like: Tensor, few_rows: bool = False) -> _Tile:
    """128 bytes of each row and column a stage: three take 96 KB at most. FP32 has no tensor cores: a smaller block."""
    rows = 64 if few_rows or like.dtype == torch.float32 else 128
    columns = 64 if like.dtype == torch.float32 else 128
    roomy = card(like.device).shared_bytes > 128 * 1024
    return _Tile(rows, columns, 128 // like.itemsize, warps=4 if rows == 64 else 8, stages=4 if roomy else 3)


@triton.jit
def _grouped_product_kernel(
    x_ptr, source_ptr, w_ptr, piece_ptr, out, k, o, groups,
    x_stride_n, x_stride_k, w_stride_e, w_stride_o, w_stride_k,
    EVEN_K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(o, N)
    group, start, end = rows_of(piece_ptr, tl.program_id(0) // across)
    if group <= groups:
        row = start + tl.arange(0, M)
        column = (tl.program_id(0) % across) * N + tl.arange(0, N)
        inner = tl.arange(0, K)
        # Rows and columns beyond the edge are read as some inside it, and not written.
        near_row = tl.minimum(row, end - 1).to(tl.int64)
        near_column = (column % o).to(tl.int64)
        if source_ptr is not None:
            near_row = tl.load(source_ptr + near_row).to(tl.int64)
        x_at = x_ptr + near_row[:, None] * x_stride_n + inner[None, :] * x_stride_k
        w_at = w_ptr + group.to(tl.int64) * w_stride_e
        w_at += near_column[None, :] * w_stride_o + inner[:, None] * w_stride_k
        total = tl.zeros((M, N), dtype=tl.float32)
        # Behind the last group there is nothing to add: those rows are zero.
        for block in range(0, tl.where(group < groups, tl.cdiv(k, K), 0)):
            if EVEN_K:
                x = tl.load(x_at)
                w = tl.load(w_at)
            else:
                inside = inner < k - block * K
                x = tl.load(x_at, mask=inside[None, :], other=0.0)
                w = tl.load(w_at, mask=inside[:, None], other=0.0)
            total = dot(x, w, total)
            x_at += K * x_stride_k
            w_at += K * w_stride_k
        place = row.to(tl.int64)[:, None] * o + column[None, :]
        tl.store(out + place, narrow(total, out.dtype.element_ty), mask=(row < end)[:, None] & (column < o)[None, :])


@triton.jit
def _row(source_ptr, token, inside):
    """Which row of an operand each token's is."""
    row = token.to(tl.int64)
    if source_ptr is not None:
        row = tl.load(source_ptr + row, mask=inside, other=0).to(tl.int64)
    return row


@triton.jit
def _weight_kernel(
    left, left_source, right, right_source, ends_ptr, out, o, i,
    left_stride_n, left_stride_o, right_stride_n, right_stride_i,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Of each group's rows a program has one of PARTS equal runs, and writes into a matrix of its own."""
    across = tl.cdiv(i, N)
    tiles = tl.cdiv(o, M) * across
    part, place = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS
    group = place // tiles
    tile = place % tiles
    row = (tile // across) * M + tl.arange(0, M)
    column = (tile % across) * N + tl.arange(0, N)
    start = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
    end = tl.load(ends_ptr + group)
    run = tl.cdiv(end - start, PARTS * K) * K
    start += part * run
    end = tl.minimum(end, start + run)
    left_at = left + (row % o).to(tl.int64)[:, None] * left_stride_o
    right_at = right + (column % i).to(tl.int64)[None, :] * right_stride_i
    total = tl.zeros((M, N), dtype=tl.float32)
    for first in range(start, end, K):
        token = first + tl.arange(0, K)
        inside = token < end
        x_row = _row(left_source, token, inside)
        y_row = _row(right_source, token, inside)
        x = tl.load(left_at + x_row[None, :] * left_stride_n, mask=inside[None, :], other=0.0)
        y = tl.load(right_at + y_row[:, None] * right_stride_n, mask=inside[:, None], other=0.0)
        total = dot(x, y, total)
    matrix = part.to(tl.int64) * (tl.num_programs(0) // (tiles * PARTS)) + group
    at = (matrix * o + row)[:, None] * i + column[None, :]
    tl.store(out + at, narrow(total, out.dtype.element_ty), mask=(row < o)[:, None] & (column < i)[None, :])


def _parts(programs: int, blocks: int, device: torch.device) -> int:
    """Into how many runs each group's rows are cut, where `programs` would leave most of a device idle.

    blocks: of rows that a group has on average; a run has four of them at least. Of 16 experts of 96 × 128 with 2,048
    rows each there are 32 programs and 16: on an H200 they took 38 and 33 µs, in four and eight runs 13 and 11.
    """
    return max(1, min(cores(device) // max(1, programs), blocks // 4, 16))


def _rows(operand: Tensor, source_n: Tensor | None) -> int:
    if source_n is None:
        return len(operand)
    check(source_n.dim() == 1 and source_n.dtype in (torch.int64, torch.int32), "source: one int64 or int32 a row")
    return len(source_n)


def _index(source_n: Tensor | None) -> Tensor | None:
    return None if source_n is None else source_n.contiguous()


def grouped_product(x_nk: Tensor, w_eok: Tensor, ends_e: Tensor, source_n: Tensor | None = None) -> Tensor:
    """Rows of group e, which end before `ends_e[e]` (int32, on the device), times w_eok[e] transposed → (n, o).

    x and w of one format and any strides: `w.mT` serves the input gradient. Rows behind the last group are zero.
    `source_n` (int64 or int32): row i is row source_n[i] of x, of which there may be any number. Raises ValueError.
    """
    n, k = _rows(x_nk, source_n), x_nk.shape[1]
    e, o, inner = w_eok.shape
    check(inner == k, f"operands: the inner dimensions are {k} and {inner}")
    check(x_nk.dtype == w_eok.dtype and x_nk.dtype in DTYPES, "operands: both FP32, BF16 or FP16")
    check(len(ends_e) == e and ends_e.dtype == torch.int32, f"ends_e: int32, {e} of them")
    source_n, ends_e = _index(source_n), ends_e.contiguous()
    if grouped_hopper.takes_product(x_nk, w_eok, source_n):
        return grouped_hopper.product(x_nk, w_eok, ends_e, source_n)
    out = x_nk.new_empty(n, o)
    tile = _tile(x_nk, few_rows=n <= 64 * e)
    tiles = n // tile.rows + min(n, e + 1)
    if out.numel():
        _grouped_product_kernel[(tiles * triton.cdiv(o, tile.columns),)](
            x_nk,
            source_n,
            w_eok,
            pieces(ends_e, n, tile.rows, tiles)[0],
            out,
            k,
            o,
            e,
            *x_nk.stride(),
            *w_eok.stride(),
            EVEN_K=k % tile.inner == 0,
            M=tile.rows,
            N=tile.columns,
            K=tile.inner,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out


def grouped_weight_product(
    left_no: Tensor,
    right_ni: Tensor,
    ends_e: Tensor,
    out_dtype: torch.dtype = torch.float32,
    *,
    left_source_n: Tensor | None = None,
    right_source_n: Tensor | None = None,
) -> Tensor:
    """left transposed times right over the rows of each group → (e, o, i); a group without rows gives zeros.

    Both of one format and any strides. With a source (int64 or int32) row i of an operand is row source_n[i] of what is
    given. Raises ValueError.
    """
    (n, o), (rows, i) = (
        (_rows(operand, source), operand.shape[1])
        for operand, source in ((left_no, left_source_n), (right_ni, right_source_n))
    )
    check(rows == n, f"operands: {n} and {rows} rows")
    check(left_no.dtype == right_ni.dtype and left_no.dtype in DTYPES, "operands: both FP32, BF16 or FP16")
    check(ends_e.dtype == torch.int32, "ends_e: int32")
    left_source_n, right_source_n, ends_e = _index(left_source_n), _index(right_source_n), ends_e.contiguous()
    if grouped_hopper.takes_weight_product(left_no, right_ni, left_source_n, right_source_n, len(ends_e)):
        return grouped_hopper.weight_product(left_no, right_ni, ends_e, out_dtype, left_source_n, right_source_n)
    tile = _tile(left_no)
    if left_source_n is not None or right_source_n is not None:
        tile = tile._replace(stages=tile.stages + 1)  # the index of the next rows is read a stage before them
    programs = len(ends_e) * triton.cdiv(o, tile.rows) * triton.cdiv(i, tile.columns)
    parts = _parts(programs, n // max(1, len(ends_e)) // tile.inner, left_no.device)
    sums = left_no.new_empty((parts, len(ends_e), o, i), dtype=out_dtype if parts == 1 else torch.float32)
    if sums.numel():
        _weight_kernel[(programs * parts,)](
            left_no,
            left_source_n,
            right_ni,
            right_source_n,
            ends_e,
            sums,
            o,
            i,
            *left_no.stride(),
            *right_ni.stride(),
            M=tile.rows,
            N=tile.columns,
            K=tile.inner,
            PARTS=parts,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return sums[0] if parts == 1 else sum_of(sums, out_dtype)
