"""A linear layer on a GPU in BF16 or FP16, whose weight's gradient leaves the product in FP32.

Left to autocast and autograd it is rounded to the format of the product and widened again, two launches and half of its
bits: what a group of experts gets from its kernel (kernels/grouped_matmul.py) a single matrix gets here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_train.kernels.cut import is_cut
from moe_train.precision import grouped
from moe_train.precision.narrowed import narrowed

_NARROW = (torch.bfloat16, torch.float16)


def takes(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether it is used: on NVIDIA's GPUs, a whole matrix in FP32, and not within what torch.compile traces."""
    return (
        grouped.widens_as_it_multiplies(x.device)
        and dtype in _NARROW
        and weight.dtype == torch.float32
        and weight.device == x.device
        and not is_cut(weight)
        and not torch.compiler.is_compiling()
    )


class LinearOfRows(torch.autograd.Function):
    """x (m, i) in BF16 or FP16 by weight (o, i) in FP32 → (m, o) like x; the weight's gradient in FP32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        narrow = narrowed(weight, x.dtype)
        ctx.save_for_backward(x, narrow)
        return grouped.product(x, narrow, None)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, narrow = ctx.saved_tensors
        grad_mo = grad_outputs[0]
        needs_x, needs_weight = ctx.needs_input_grad
        return (
            grouped.input_gradient(grad_mo, narrow, None) if needs_x else None,
            grouped.weight_gradient(grad_mo, x, None, torch.float32) if needs_weight else None,
        )
