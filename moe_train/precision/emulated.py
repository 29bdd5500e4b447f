"""FP8 products on any device: operands rounded to FP8, multiplied as FP32 numbers.

It computes what the recipe says, without the speed, and is what the other backends are held to. Groups are read on the
host and taken one after another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.config import OperandConfig
from moe_train.kernels.layouts import DTYPES, PIECE, Columns, Rows, Weights, piece_ends, pieces_at_most
from moe_train.precision.accumulate import Accumulation, product
from moe_train.precision.quantize import Quantized, quantize


class Emulated:
    """A backend (precision/backends.py)."""

    name = "emulated"

    def __init__(self, accumulation: Accumulation = "float32") -> None:
        self.accumulation: Accumulation = accumulation

    def quantize(
        self,
        x_nk: Tensor,
        ends_e: Tensor,
        *,
        rows: OperandConfig | None,
        columns: OperandConfig | None,
        power_of_two: bool | None = None,
    ) -> tuple[Rows | None, Columns | None]:
        as_rows = None if rows is None else _rows(x_nk, ends_e, rows, power_of_two)
        return as_rows, None if columns is None else _columns(x_nk, ends_e, columns, power_of_two)

    def quantize_again(
        self, rows: Rows, ends_e: Tensor, columns: OperandConfig, *, power_of_two: bool | None = None
    ) -> Columns:
        return _columns(dequantized(rows.values, rows.scales), ends_e, columns, power_of_two)

    def round_weights(
        self, weight_eoi: Tensor, forward: OperandConfig | None, backward: OperandConfig | None
    ) -> tuple[Weights | None, Weights | None]:
        return (
            None if forward is None else _weights(weight_eoi, forward),
            None if backward is None else _weights(weight_eoi.mT, backward),
        )

    def product(self, left: Rows, right: Weights, ends_e: Tensor, dtype: torch.dtype) -> Tensor:
        out = left.scales.new_zeros(len(left.values), right.values.shape[1], dtype=dtype)
        with torch.autocast(out.device.type, enabled=False):  # it would round the operands to BF16
            for group, (start, end) in enumerate(bounds(ends_e)):
                if end > start:
                    rows = dequantized(left.values[start:end], left.scales[start:end])
                    weight = dequantized(right.values[group], right.scales[group])
                    out[start:end] = product(rows, weight, self.accumulation).to(dtype)
        return out

    def weight_product(self, left: Columns, right: Columns, ends_e: Tensor) -> Tensor:
        # groups without rows have a gradient of zero
        out = left.scales.new_zeros(len(ends_e), len(left.values), len(right.values))
        first = 0
        for group, ((start, end), piece_end) in enumerate(zip(bounds(ends_e), left.ends_e.tolist())):
            if end > start:
                begin = first * PIECE
                columns, pieces = slice(begin, begin + end - start), slice(first, piece_end)
                operands = [dequantized(side.values[:, columns], side.scales[:, pieces]) for side in (left, right)]
                out[group] = product(operands[0], operands[1], self.accumulation)
            first = piece_end
        return out


def dequantized(values: Tensor, scales: Tensor) -> Tensor:
    """FP32 of values (…, rows, k) and a scale for each row and piece of 128."""
    return values.to(torch.float32) * scales.repeat_interleave(PIECE, -1)[..., : values.shape[-1]]


def bounds(ends_e: Tensor) -> list[tuple[int, int]]:
    """(start, end) of each group, read on the host."""
    ends = ends_e.tolist()
    return list(zip([0, *ends[:-1]], ends))


def _rows(x_nk: Tensor, ends_e: Tensor, operand: OperandConfig, power_of_two: bool | None) -> Rows:
    rows, inner = x_nk.shape
    values = x_nk.new_zeros(rows, inner, dtype=DTYPES[operand.format])
    scales = x_nk.new_ones(rows, -(-inner // PIECE), dtype=torch.float32)
    # A tile or a row is the same whatever group it is in.
    parts = [(0, rows)] if operand.scale_of in ("tile", "row") else bounds(ends_e)
    for start, end in parts:
        if end > start:
            part = quantize(x_nk[start:end], operand, power_of_two=power_of_two)
            values[start:end], scales[start:end] = part.values, _spread(part)
    return Rows(values, scales)


def _columns(x_nk: Tensor, ends_e: Tensor, operand: OperandConfig, power_of_two: bool | None) -> Columns:
    rows, inner = x_nk.shape
    pieces = pieces_at_most(rows, len(ends_e))
    values = x_nk.new_zeros(inner, PIECE * pieces, dtype=DTYPES[operand.format])
    scales = x_nk.new_ones(inner, pieces, dtype=torch.float32)
    ends_in_pieces = piece_ends(ends_e)
    first = 0
    for (start, end), last in zip(bounds(ends_e), ends_in_pieces.tolist()):
        if end > start:
            part = quantize(x_nk[start:end].mT, operand, power_of_two=power_of_two)
            values[:, first * PIECE : first * PIECE + end - start] = part.values
            scales[:, first:last] = _spread(part)
        first = last
    return Columns(values, scales, ends_in_pieces)


def _weights(weight_eok: Tensor, operand: OperandConfig) -> Weights:
    part = quantize(weight_eok, operand)
    return Weights(part.values, _spread(part), shared_rows=operand.scale_of in ("block", "tensor"))


def _spread(part: Quantized) -> Tensor:
    """A scale for each row and each piece of 128, whatever shared it."""
    rows, inner = part.values.shape[-2:]
    height, width = part.piece
    scales = part.scales.repeat_interleave(height, -2)[..., :rows, :]
    pieces = -(-inner // PIECE)
    return scales if width == PIECE else scales.expand(*scales.shape[:-1], pieces)
