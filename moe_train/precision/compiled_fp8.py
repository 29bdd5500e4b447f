"""The emulated backend's products where the kernels in C are in use: the same numbers on BF16 units.

Every FP8 number is a BF16 number, and the product of two an FP32 number, so what the units add up is what the emulated
backend multiplies in FP32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.kernels.cpu import fp8
from moe_train.kernels.layouts import Columns, Rows, Weights
from moe_train.precision.backends import ByToken, Rate


class CompiledFp8:
    """A backend (precision/backends.py): `emulated` of a CPU that multiplies BF16; FP32 sums alone."""

    name = "emulated"
    multiplies_in: Rate = "bfloat16"
    asks_host: bool = True
    by_token: ByToken | None = None

    quantize = staticmethod(fp8.quantize)
    quantize_again = staticmethod(fp8.quantize_again)
    dequantize = staticmethod(fp8.dequantize)
    round_weights = staticmethod(fp8.round_weights)
    swiglu = staticmethod(fp8.swiglu_quantize)
    swiglu_backward = staticmethod(fp8.swiglu_backward_quantize)

    def product(self, left: Rows, right: Weights, ends_e: Tensor, dtype: torch.dtype) -> Tensor:
        return fp8.product(left, right, ends_e, dtype)

    def weight_product(self, left: Columns, right: Columns) -> Tensor:
        return fp8.weight_product(left, right)
