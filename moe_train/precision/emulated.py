"""FP8 products on any device: operands rounded to FP8, multiplied as FP32 numbers.

It computes what the recipe says, without the speed, and is what the other backends are held to. Groups are read on the
host and taken one after another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.kernels import reference
from moe_train.kernels.layouts import Columns, Rows, Weights
from moe_train.precision.accumulate import Accumulation
from moe_train.precision.backends import ByToken, Rate


class Emulated:
    """A backend (precision/backends.py): the plain PyTorch form of the kernels. `accumulation` of its products."""

    name = "emulated"
    multiplies_in: Rate = "float32"
    asks_host: bool = True
    by_token: ByToken | None = None

    quantize = staticmethod(reference.quantize)
    quantize_again = staticmethod(reference.quantize_again)
    dequantize = staticmethod(reference.dequantize)
    round_weights = staticmethod(reference.round_weights)
    swiglu = staticmethod(reference.swiglu_quantize)
    swiglu_backward = staticmethod(reference.swiglu_backward_quantize)

    def __init__(self, accumulation: Accumulation = "float32") -> None:
        self.accumulation: Accumulation = accumulation

    def product(self, left: Rows, right: Weights, ends_e: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast(left.values.device.type, enabled=False):  # it would round the operands to BF16
            return reference.grouped_product(left, right, ends_e, dtype, self.accumulation)

    def weight_product(self, left: Columns, right: Columns) -> Tensor:
        with torch.autocast(left.values.device.type, enabled=False):
            return reference.grouped_weight_product(left, right, accumulation=self.accumulation)
