"""One block of 128 x 128 numbers rounded to FP8 for a product over its columns, one over its rows, or both.

Every kernel that has a block in registers ends with `round_block`. `Outputs` is the host's side of it: the two layouts
to fill and the arguments that say how. Scales that a block does not know by itself (a whole row's, a whole group's)
come from largest magnitudes found in an earlier pass, as the bits of FP32 numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_train.config import OperandConfig
from moe_train.kernels.capability import card
from moe_train.kernels.device import round_to_fp8, scale_of_largest
from moe_train.kernels.layouts import DTYPES, PIECE, Columns, Rows

WARPS = 16  # of a program that has a whole block: 32 numbers a thread, which fits its registers


class Parts(NamedTuple):
    """How a block is shared out: `rows` of it to each program of one layout, `columns` to each of the other.

    Such programs are small, and six or more run beside each other on a core, so that some compute while others wait for
    memory; what the second layout reads comes from a cache. Where 128 x 128 numbers share a scale one program has them.
    """

    rows: int
    columns: int
    warps: int
    programs: int

    @property
    def sizes(self) -> dict[str, int]:
        """Arguments of a kernel."""
        return {"M": self.rows, "N": self.columns, "num_warps": self.warps}


def parts_of(rows: OperandConfig | None, columns: OperandConfig | None, warps: int = 4) -> Parts:
    """For the layouts asked for; 4 warps have 32 numbers a thread."""
    if any(operand and operand.scale_of == "block" for operand in (rows, columns)):
        return Parts(PIECE, PIECE, WARPS, 1)
    return Parts(32, 32, warps, 4 * bool(rows) + 4 * bool(columns))


@triton.jit
def ordered(x):
    """Numbers (FP32) as unsigned integers in the order of their magnitudes, infinities and NaN before all others.

    Two instructions a number for the largest of many, where comparing magnitudes takes four.
    """
    return (x.to(tl.int32, bitcast=True) * 2 + 0x01000000).to(tl.uint32, bitcast=True)


@triton.jit
def magnitude_of(key):
    """The magnitude that `ordered` gives `key`; 0 of what is not finite."""
    return ((tl.maximum(key, 0x01000000) - 0x01000000) >> 1).to(tl.float32, bitcast=True)


@triton.jit
def rows_of_piece(start):
    """The rows of a piece (128) in the order in which `round_block` has those along tokens: 0, 4, 8, …, 1, 5, …"""
    index = tl.arange(0, 128)
    return start + index % 32 * 4 + index // 32


@triton.jit
def round_block(
    x, row, end, column, block, k, group, piece,
    row_values, row_scales, column_values, column_scales, inner,
    largest_row, largest_column, largest_group,
    ROWS: tl.constexpr, ROWS_E4M3: tl.constexpr, ROWS_POWER: tl.constexpr,
    COLUMNS: tl.constexpr, COLUMNS_E4M3: tl.constexpr, COLUMNS_POWER: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Round x (m, c) in FP32, zero beyond `end` and `k`, into the layouts asked for.

    row, column: which row of all and which column each element is. Of a layout whose scales are those of tiles, a whole
    tile is there: along a row the 128 columns of `block`, along a column the 128 rows of `piece` in the order of
    `rows_of_piece`. inner: 128 p, the width of the column layout. ROWS, COLUMNS: what shares a scale in each layout,
    None where it is not wanted.
    """
    PIECE: tl.constexpr = 128
    key = ordered(x)
    blocks = tl.cdiv(k, PIECE)
    if ROWS is not None:
        if ROWS == "row":
            largest = tl.load(largest_row + row, mask=row < end, other=0).to(tl.float32, bitcast=True)
        elif ROWS == "tensor":
            largest = tl.load(largest_group + group + row * 0).to(tl.float32, bitcast=True)
        else:
            largest = tl.max(key, 1)
            if ROWS == "block":
                largest = tl.broadcast_to(tl.max(largest, 0), largest.shape)
            largest = magnitude_of(largest)
        scale = scale_of_largest(largest, ROWS_E4M3, ROWS_POWER)
        rounded = round_to_fp8(x, scale[:, None], ROWS_E4M3, NATIVE)
        place = row.to(tl.int64)[:, None] * k + column[None, :]
        tl.store(row_values + place, rounded, mask=(row < end)[:, None] & (column < k)[None, :])
        tl.store(row_scales + row.to(tl.int64) * blocks + block, scale, mask=row < end)
    if COLUMNS is not None:
        wide = column.to(tl.int64)
        if COLUMNS == "row":
            at = group.to(tl.int64) * k + column
            largest = tl.load(largest_column + at, mask=column < k, other=0).to(tl.float32, bitcast=True)
        elif COLUMNS == "tensor":
            largest = tl.load(largest_group + group + column * 0).to(tl.float32, bitcast=True)
        else:
            largest = tl.max(key, 0)
            if COLUMNS == "block":
                largest = tl.broadcast_to(tl.max(largest, 0), largest.shape)
            largest = magnitude_of(largest)
        scale = scale_of_largest(largest, COLUMNS_E4M3, COLUMNS_POWER)
        rounded = round_to_fp8(x, scale[None, :], COLUMNS_E4M3, NATIVE)
        # A thread has four rows that follow one another in memory: they are turned as one number, not as four bytes.
        four = tl.reshape(rounded, (4, 32, column.shape[0])).to(tl.int32) << (8 * tl.arange(0, 4))[:, None, None]
        place = wide[None, :] * (inner // 4) + (piece * 32 + tl.arange(0, 32))[:, None]
        tl.store(column_values + place, tl.sum(four, 0), mask=(column < k)[None, :])
        tl.store(column_scales + piece.to(tl.int64) * k + column, scale, mask=column < k)


class Outputs:
    """The layouts of n rows of k numbers in `pieces` pieces that are asked for, and the arguments of `round_block`."""

    def __init__(
        self,
        like: Tensor,
        shape: tuple[int, int, int, int],  # n, k, pieces, groups
        rows: OperandConfig | None,
        columns: OperandConfig | None,
    ) -> None:
        n, k, pieces, groups = shape
        self.operands = (rows, columns)
        asked = {operand.scale_of for operand in (rows, columns) if operand}
        empty = like.new_empty
        blocks = triton.cdiv(k, PIECE)
        largest = like.new_zeros
        self.arguments: dict[str, Any] = {
            "row_values": empty((n, k), dtype=torch.uint8) if rows else None,
            "row_scales": empty((n, blocks), dtype=torch.float32) if rows else None,
            "column_values": empty((k, pieces * (PIECE // 4)), dtype=torch.int32) if columns else None,
            "column_scales": empty((pieces, k), dtype=torch.float32) if columns else None,
            "inner": pieces * PIECE,
            "largest_row": largest(n, dtype=torch.int32) if rows and rows.scale_of == "row" else None,
            "largest_column": (
                largest((groups, k), dtype=torch.int32) if columns and columns.scale_of == "row" else None
            ),
            "largest_group": largest(groups, dtype=torch.int32) if "tensor" in asked else None,
            "NATIVE": card(like.device).rounds_fp8,
        }
        for name, operand in (("ROWS", rows), ("COLUMNS", columns)):
            self.arguments[name] = operand.scale_of if operand else None
            self.arguments[f"{name}_E4M3"] = operand is not None and operand.format == "e4m3"
            self.arguments[f"{name}_POWER"] = operand is not None and operand.power_of_two

    def largest(self) -> dict[str, Tensor | None]:
        """Where an earlier pass leaves the largest magnitudes; empty where a block knows its scales."""
        found = {name: self.arguments[name] for name in ("largest_row", "largest_column", "largest_group")}
        return found if any(tensor is not None for tensor in found.values()) else {}

    def layouts(self, piece_ends_e: Tensor) -> tuple[Rows | None, Columns | None]:
        rows, columns = self.operands
        made = self.arguments
        return (
            Rows(made["row_values"].view(DTYPES[rows.format]), made["row_scales"]) if rows else None,
            Columns(made["column_values"].view(DTYPES[columns.format]), made["column_scales"].t(), piece_ends_e)
            if columns
            else None,
        )
