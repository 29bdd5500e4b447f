"""Rounding to FP8 in one pass: a block of 128 x 128 numbers is read once and written in up to two layouts.

Bit for bit what moe_train/precision/quantize.py computes for every group. Tiles and blocks know their scales; for the
scales of whole rows and groups a pass before finds the largest magnitudes with integer maxima, whose order is all the
same. Nothing waits for the host: a program finds its group on the device, and those without one end.

    n rows of all groups, k inner, e groups, o outputs, i inputs, p pieces
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_train.config import OperandConfig
from moe_train.kernels.capability import check
from moe_train.kernels.device import decode, widen
from moe_train.kernels.layouts import PIECE, Columns, Rows, Weights, pieces_at_most
from moe_train.kernels.pieces import pieces as rows_of_pieces
from moe_train.kernels.pieces import rows_of
from moe_train.kernels.rounding import WARPS, Outputs, magnitude_of, ordered, parts_of, round_block, rows_of_piece

SHARED = ("block", "tensor")  # what makes 128 rows have the same scales


@triton.jit
def _load(
    x_ptr, x_scales, source_ptr, row, end, column, block, k, stride, SOURCE: tl.constexpr, NATIVE: tl.constexpr
):  # fmt: skip
    """A block in FP32, zero beyond its group and beyond k. SOURCE: "float", or the FP8 format of bytes with scales."""
    at = row.to(tl.int64) if source_ptr is None else tl.load(source_ptr + row, mask=row < end, other=0)
    place = at[:, None] * stride + column[None, :]
    inside = (row < end)[:, None] & (column < k)[None, :]
    if SOURCE == "float":
        x = widen(tl.load(x_ptr + place, mask=inside, other=0.0))
    else:
        scale = tl.load(x_scales + at * tl.cdiv(k, 128) + block, mask=row < end, other=0.0)
        byte = tl.load(x_ptr + place, mask=inside, other=0)
        if NATIVE and SOURCE == "e4m3":
            half = byte.to(tl.float8e4nv, bitcast=True).to(tl.float16)
        else:
            half = decode(byte, SOURCE == "e4m3")
        x = half.to(tl.float32) * scale[:, None]
    return x


@triton.jit
def _largest_kernel(
    x_ptr, x_scales, source_ptr, piece_ptr, largest_row, largest_column, largest_group, k, groups, stride,
    SOURCE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    group, start, end = rows_of(piece_ptr, tl.program_id(0))
    if group < groups:
        row = start + tl.arange(0, 128)
        block = tl.program_id(1)
        column = block * 128 + tl.arange(0, 128)
        x = _load(x_ptr, x_scales, source_ptr, row, end, column, block, k, stride, SOURCE, NATIVE)
        key = ordered(x)
        if largest_row is not None:
            tl.atomic_max(largest_row + row, magnitude_of(tl.max(key, 1)).to(tl.int32, bitcast=True), mask=row < end)
        if largest_column is not None:
            at = group.to(tl.int64) * k + column
            tl.atomic_max(largest_column + at, magnitude_of(tl.max(key, 0)).to(tl.int32, bitcast=True), mask=column < k)
        if largest_group is not None:
            tl.atomic_max(largest_group + group, magnitude_of(tl.max(tl.max(key, 1), 0)).to(tl.int32, bitcast=True))


@triton.jit
def _round_part(
    x_ptr, x_scales, source_ptr, stride, row, end, column, block, k, group, piece,
    row_values, row_scales, column_values, column_scales, inner, largest_row, largest_column, largest_group,
    ROWS: tl.constexpr, ROWS_E4M3: tl.constexpr, ROWS_POWER: tl.constexpr,
    COLUMNS: tl.constexpr, COLUMNS_E4M3: tl.constexpr, COLUMNS_POWER: tl.constexpr,
    NATIVE: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    x = _load(x_ptr, x_scales, source_ptr, row, end, column, block, k, stride, SOURCE, NATIVE)
    round_block(
        x, row, end, column, block, k, group, piece,
        row_values, row_scales, column_values, column_scales, inner, largest_row, largest_column, largest_group,
        ROWS, ROWS_E4M3, ROWS_POWER, COLUMNS, COLUMNS_E4M3, COLUMNS_POWER, NATIVE,
    )  # fmt: skip


@triton.jit
def _quantize_kernel(
    x_ptr, x_scales, source_ptr, piece_ptr, k, groups, stride,
    row_values, row_scales, column_values, column_scales, inner, largest_row, largest_column, largest_group,
    ROWS: tl.constexpr, ROWS_E4M3: tl.constexpr, ROWS_POWER: tl.constexpr,
    COLUMNS: tl.constexpr, COLUMNS_E4M3: tl.constexpr, COLUMNS_POWER: tl.constexpr,
    NATIVE: tl.constexpr, SOURCE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A block for both layouts (M and N 128), or M of its rows for one or N of its columns for the other."""
    FOR_ROWS: tl.constexpr = 128 // M if ROWS is not None else 0
    FOR_COLUMNS: tl.constexpr = 128 // N if COLUMNS is not None else 0
    TOGETHER: tl.constexpr = M == 128
    PARTS: tl.constexpr = 1 if TOGETHER else FOR_ROWS + FOR_COLUMNS
    part = tl.program_id(0) % PARTS
    block = tl.program_id(0) // PARTS % tl.cdiv(k, 128)
    piece = tl.program_id(0) // PARTS // tl.cdiv(k, 128)
    group, start, end = rows_of(piece_ptr, piece)
    column = block * 128 + tl.arange(0, 128)
    if group < groups:
        if TOGETHER:
            _round_part(
                x_ptr, x_scales, source_ptr, stride, rows_of_piece(start), end, column, block, k, group, piece,
                row_values, row_scales, column_values, column_scales, inner, largest_row, largest_column, largest_group,
                ROWS, ROWS_E4M3, ROWS_POWER, COLUMNS, COLUMNS_E4M3, COLUMNS_POWER, NATIVE, SOURCE,
            )  # fmt: skip
        elif part < FOR_ROWS:
            _round_part(
                x_ptr, x_scales, source_ptr, stride,
                start + part * M + tl.arange(0, M), end, column, block, k, group, piece,
                row_values, row_scales, column_values, column_scales, inner, largest_row, largest_column, largest_group,
                ROWS, ROWS_E4M3, ROWS_POWER, None, COLUMNS_E4M3, COLUMNS_POWER, NATIVE, SOURCE,
            )  # fmt: skip
        else:
            # Eight to a thread, whatever their format: with sixteen bytes it would have too few rows to turn.
            of_part = block * 128 + (part - FOR_ROWS) * N + tl.max_contiguous(tl.arange(0, N), 8)
            _round_part(
                x_ptr, x_scales, source_ptr, stride, rows_of_piece(start), end, of_part, block, k, group, piece,
                row_values, row_scales, column_values, column_scales, inner, largest_row, largest_column, largest_group,
                None, ROWS_E4M3, ROWS_POWER, COLUMNS, COLUMNS_E4M3, COLUMNS_POWER, NATIVE, SOURCE,
            )  # fmt: skip


def quantize(
    x_nk: Tensor,
    ends_e: Tensor,
    *,
    rows: OperandConfig | None,
    columns: OperandConfig | None,
) -> tuple[Rows | None, Columns | None]:
    """x (n, k) in FP32, BF16 or FP16, groups that end at `ends_e` (int32, on x's device) → the layouts asked for.

    rows: the operand (n, k), each group for itself. columns: the operand (k, tokens) of each group. Rows that belong to
    no group are left unset: no product reads them. Raises ValueError.
    """
    return _quantize(_float(x_nk), None, None, ends_e, rows, columns)


def quantize_tokens(
    x_tk: Tensor,
    source_n: Tensor,
    ends_e: Tensor,
    *,
    rows: OperandConfig | None,
    columns: OperandConfig | None,
) -> tuple[Rows | None, Columns | None]:
    """What `quantize` makes of the rows x[source_n] (int64), which exist nowhere. Raises ValueError."""
    return _quantize(_float(x_tk), None, source_n, ends_e, rows, columns)


def quantize_again(rows: Rows, ends_e: Tensor, columns: OperandConfig) -> Columns:
    """An operand kept as Rows, rounded again for a product over its tokens (arXiv 2412.19437, section 3.3.3)."""
    _, found = _quantize(rows.values, rows.scales, None, ends_e, None, columns)
    assert found is not None
    return found


def quantize_tokens_again(rows: Rows, source_n: Tensor, ends_e: Tensor, columns: OperandConfig) -> Columns:
    """What `quantize_again` makes of the rows source_n (int64). Raises ValueError."""
    _, found = _quantize(rows.values, rows.scales, source_n, ends_e, None, columns)
    assert found is not None
    return found


def _float(x: Tensor) -> Tensor:
    check(x.dim() == 2 and x.dtype in (torch.float32, torch.bfloat16, torch.float16), "x: a float matrix")
    return x


def round_weights(
    w_eoi: Tensor, forward: OperandConfig | None, backward: OperandConfig | None
) -> tuple[Weights | None, Weights | None]:
    """Weights (e, o, i) for y = x wᵀ, values (e, o, i), and for dx = dy w, values (e, i, o); read once."""
    e, o, i = w_eoi.shape
    ends_e = torch.arange(1, e + 1, dtype=torch.int32, device=w_eoi.device) * o
    blocks = triton.cdiv(o, PIECE)
    rows, columns = _quantize(w_eoi.reshape(e * o, i), None, None, ends_e, forward, backward, e * blocks)
    straight = turned = None
    if forward and rows:
        straight = Weights(rows.values.view(e, o, i), rows.scales.view(e, o, -1), forward.scale_of in SHARED)
    if backward and columns:
        values = columns.values.view(i, e, blocks * PIECE)[:, :, :o].permute(1, 0, 2)
        scales = columns.scales.view(i, e, blocks).permute(1, 0, 2)
        turned = Weights(values, scales, backward.scale_of in SHARED)
    return straight, turned


def _quantize(
    x_nk: Tensor,
    x_scales: Tensor | None,
    source_n: Tensor | None,
    ends_e: Tensor,
    rows: OperandConfig | None,
    columns: OperandConfig | None,
    pieces: int | None = None,
) -> tuple[Rows | None, Columns | None]:
    n, k = len(x_nk if source_n is None else source_n), x_nk.shape[1]
    groups = len(ends_e)
    pieces = pieces_at_most(n, groups) if pieces is None else pieces
    check(source_n is None or source_n.dtype == torch.int64, "source_n: int64")
    check(ends_e.dtype == torch.int32 and ends_e.device == x_nk.device, "ends_e: int32, on the device of x")
    x_nk = x_nk if x_nk.stride(1) == 1 else x_nk.contiguous()
    source = "float" if x_scales is None else "e4m3" if x_nk.dtype == torch.float8_e4m3fn else "e5m2"
    table, piece_ends_e = rows_of_pieces(ends_e, n, PIECE, pieces)
    shared: dict[str, Any] = {
        "x_ptr": x_nk if x_scales is None else x_nk.view(torch.uint8),
        "x_scales": None if x_scales is None else x_scales.contiguous(),
        "source_ptr": None if source_n is None else source_n.contiguous(),
        "piece_ptr": table,
        "k": k,
        "groups": groups,
        "stride": x_nk.stride(0),
        "SOURCE": source,
    }
    outputs = Outputs(x_nk, (n, k, pieces, groups), rows, columns)
    blocks = triton.cdiv(k, PIECE)
    if n and k:
        if largest := outputs.largest():
            native = outputs.arguments["NATIVE"]
            _largest_kernel[(pieces, blocks)](**shared, **largest, NATIVE=native, num_warps=WARPS)
        parts = parts_of(rows, columns)
        _quantize_kernel[(pieces * blocks * parts.programs,)](**shared, **outputs.arguments, **parts.sizes)
    return outputs.layouts(piece_ends_e)
