"""One block of 128 x 128 numbers rounded to FP8 for a product over its columns, one over its rows, or both.

Every kernel that has a block in registers ends with `round_block`. `Outputs` is the host's side of it: the two layouts
to fill and the arguments that say how. Scales that a block does not know by itself (a whole row's, a whole group's)
come from largest magnitudes found in an earlier pass, as the bits of FP32 numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_train.config import OperandConfig
from moe_train.kernels.capability import card
from moe_train.kernels.device import round_to_fp8, scale_of_largest
from moe_train.kernels.layouts import DTYPES, PIECE, Columns, Rows

WARPS = 16  # 32 numbers of a block a thread: what they take fits its registers


@triton.jit
def finite_magnitude(x):
    magnitude = tl.abs(x)
    return tl.where(magnitude < float("inf"), magnitude, 0.0)


@triton.jit
def round_block(
    x, row, end, column, k, group, piece,
    row_values, row_scales, column_values, column_scales, inner,
    largest_row, largest_column, largest_group,
    ROWS: tl.constexpr, ROWS_E4M3: tl.constexpr, ROWS_POWER: tl.constexpr,
    COLUMNS: tl.constexpr, COLUMNS_E4M3: tl.constexpr, COLUMNS_POWER: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Round x (128, 128) in FP32, zero beyond `end` and `k`, into the layouts asked for.

    row, column: which row of all and which column each element is. inner: 128 p, the width of the column layout.
    ROWS, COLUMNS: what shares a scale in each layout, None where it is not wanted.
    """
    PIECE: tl.constexpr = 128
    magnitude = finite_magnitude(x)
    blocks = tl.cdiv(k, PIECE)
    block = tl.max(column, 0) // PIECE
    if ROWS is not None:
        if ROWS == "row":
            largest = tl.load(largest_row + row, mask=row < end, other=0).to(tl.float32, bitcast=True)
        elif ROWS == "tensor":
            largest = tl.load(largest_group + group + row * 0).to(tl.float32, bitcast=True)
        else:
            largest = tl.max(magnitude, 1)
            if ROWS == "block":
                largest = tl.broadcast_to(tl.max(largest, 0), largest.shape)
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
            largest = tl.max(magnitude, 0)
            if COLUMNS == "block":
                largest = tl.broadcast_to(tl.max(largest, 0), largest.shape)
        scale = scale_of_largest(largest, COLUMNS_E4M3, COLUMNS_POWER)
        rounded = round_to_fp8(x, scale[None, :], COLUMNS_E4M3, NATIVE)
        place = wide[None, :] * inner + (piece * PIECE + tl.arange(0, PIECE))[:, None]
        tl.store(column_values + place, rounded, mask=(column < k)[None, :])
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
            "column_values": empty((k, pieces * PIECE), dtype=torch.uint8) if columns else None,
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
