"""Rows on their way to experts in FP8: E4M3 in tiles of 1 x 128 with FP32 scales, half the bytes of BF16.

As in DeepSeek-V3 (arXiv 2412.19437, section 3.3.3), scales are powers of two, so that a recipe with the same tiles
rounds what arrives to the same values. A row's bytes are its values, then its scales: one exchange takes both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.config import OperandConfig
from moe_train.kernels.layouts import DTYPES, PIECE
from moe_train.model.experts import Experts
from moe_train.precision.quantize import Quantized, quantize
from moe_train.precision.recipes import with_powers_of_two

OPERAND = OperandConfig(format="e4m3", scale_of="tile", power_of_two=True)
_BYTES_OF_SCALE = 4


def packed(x_nd: Tensor) -> Tensor:
    """Rows (n, d) → bytes (n, d + 4·⌈d/128⌉)."""
    rows, width = x_nd.shape
    if rows == 0:
        return x_nd.new_empty(0, width + _BYTES_OF_SCALE * -(-width // PIECE), dtype=torch.uint8)
    rounded = quantize(x_nd, OPERAND)
    return torch.cat([rounded.values.view(torch.uint8), rounded.scales.contiguous().view(torch.uint8)], dim=1)


def unpacked(bytes_nb: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Those rows again, rounded: (n, width)."""
    if len(bytes_nb) == 0:
        return bytes_nb.new_empty(0, width, dtype=dtype)
    values = bytes_nb[:, :width].view(DTYPES[OPERAND.format])
    scales = bytes_nb[:, width:].contiguous().view(torch.float32)
    return Quantized(values, scales, (1, PIECE)).dequantized().to(dtype)


def rounded_once(experts: Experts) -> None:
    """Let a recipe with the same tiles keep what arrived as it is: the tokens, and the gradients of the outputs."""
    first, second = experts.fp8 or (None, None)
    if first is not None and first.recipe.forward.activation.scale_of == OPERAND.scale_of:
        first.recipe = with_powers_of_two(first.recipe, inputs=True, gradients=False)
    if second is not None and second.recipe.input_gradient.gradient.scale_of == OPERAND.scale_of:
        second.recipe = with_powers_of_two(second.recipe, inputs=False, gradients=True)
