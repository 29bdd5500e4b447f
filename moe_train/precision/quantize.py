"""Rounding to FP8 with scales: the reference, in plain PyTorch, for any device.

A matrix (rows, inner) is cut into pieces of a recipe's shape; a piece's scale is its largest finite magnitude over the
format's largest value, and what is stored is the nearest FP8 value of x / scale. Ties go to even. So:

    a piece of zeros has scale 1; a scale is never below FP32's smallest normal number, so tiny pieces become 0
    infinities and NaN are NaN, in their own place alone: they do not reach their neighbours through the scale
    rows and columns need not be multiples of 128: the last piece is smaller

Formats: E4M3 (4 bits of exponent, 3 of mantissa, largest value 448, no infinity) and E5M2 (largest 57,344).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.config import OperandConfig
from moe_train.kernels.layouts import DTYPES, PIECE

SMALLEST_SCALE = 2.0**-126


class Quantized:
    """FP8 values (…, rows, inner) and the FP32 scale of each piece (…, row pieces, inner pieces)."""

    def __init__(self, values: Tensor, scales: Tensor, piece: tuple[int, int]) -> None:
        self.values, self.scales, self.piece = values, scales, piece

    def dequantized(self) -> Tensor:
        """FP32 (…, rows, inner)."""
        return self.values.to(torch.float32) * _spread(self.scales, self.piece, self.values.shape)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


def quantize(x: Tensor, operand: OperandConfig) -> Quantized:
    """x (…, rows, inner) in any float format; leading dimensions (experts) are quantised each for itself.

    The last dimension is what the product sums over.
    """
    piece = _piece(operand, x.shape)
    exact = x.detach().to(torch.float32)
    finite = exact.isfinite()
    magnitude = torch.where(finite, exact.abs(), 0.0)
    largest = torch.finfo(DTYPES[operand.format]).max
    found = _largest_of_pieces(magnitude, piece)
    # Divided by a tensor: by a number, torch multiplies with its reciprocal on CUDA, which changes last bits.
    scales = found / torch.full_like(found, largest)
    if operand.power_of_two:
        scales = _rounded_up_to_power_of_two(scales)
    scales = torch.where(scales > 0, scales.clamp_min(SMALLEST_SCALE), 1.0)
    scaled = exact / _spread(scales, piece, x.shape)
    # The cast saturates or makes NaN, depending on the device: neither is left to it.
    scaled = torch.where(finite, scaled.clamp(-largest, largest), torch.nan)
    return Quantized(scaled.to(DTYPES[operand.format]), scales, piece)


def _piece(operand: OperandConfig, shape: torch.Size) -> tuple[int, int]:
    rows, inner = max(1, shape[-2]), max(1, shape[-1])
    return {"tile": (1, PIECE), "block": (PIECE, PIECE), "row": (1, inner), "tensor": (rows, inner)}[operand.scale_of]


def _largest_of_pieces(magnitude: Tensor, piece: tuple[int, int]) -> Tensor:
    height, width = piece
    rows, inner = magnitude.shape[-2:]
    padded = F.pad(magnitude, (0, -inner % width, 0, -rows % height))
    largest: Tensor = padded.unflatten(-2, (-1, height)).unflatten(-1, (-1, width)).amax((-3, -1))
    return largest


def _spread(scales: Tensor, piece: tuple[int, int], shape: torch.Size) -> Tensor:
    """Every element's scale, (…, rows, inner)."""
    height, width = piece
    whole = scales.repeat_interleave(height, -2) if height > 1 else scales
    whole = whole.repeat_interleave(width, -1) if width > 1 else whole
    return whole[..., : shape[-2], : shape[-1]]


def _rounded_up_to_power_of_two(scales: Tensor) -> Tensor:
    """Of numbers that are not negative. By their bits: torch's ldexp goes through a power that need not be exact."""
    bits = scales.view(torch.int32)
    return ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)
