"""FP8 products by the project's own kernels: every recipe, experts included, with no group's size read on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.kernels import dequantize as widening
from moe_train.kernels import fp8_matmul
from moe_train.kernels import quantize as rounding
from moe_train.kernels import swiglu as activation
from moe_train.kernels.collect import collect
from moe_train.kernels.layouts import Columns, Rows, Weights
from moe_train.precision.backends import ByToken, Rate


class _ByToken:
    quantize = staticmethod(rounding.quantize_tokens)
    quantize_again = staticmethod(rounding.quantize_tokens_again)
    product = staticmethod(fp8_matmul.grouped_product)
    collect = staticmethod(collect)


class Triton:
    """A backend (precision/backends.py)."""

    name = "triton"
    asks_host: bool = False
    by_token: ByToken | None = _ByToken()

    quantize = staticmethod(rounding.quantize)
    quantize_again = staticmethod(rounding.quantize_again)
    dequantize = staticmethod(widening.dequantize)
    round_weights = staticmethod(rounding.round_weights)
    swiglu = staticmethod(activation.swiglu_quantize)
    swiglu_backward = staticmethod(activation.swiglu_backward_quantize)

    def __init__(self, multiplies_in: Rate) -> None:
        self.multiplies_in = multiplies_in

    def product(self, left: Rows, right: Weights, ends_e: Tensor, dtype: torch.dtype) -> Tensor:
        return fp8_matmul.grouped_product(left, right, ends_e, dtype)

    def weight_product(self, left: Columns, right: Columns) -> Tensor:
        return fp8_matmul.grouped_weight_product(left, right)
