"""Linear layers on a GPU in BF16 or FP16, whose weights' gradients leave the product in FP32.

Left to autocast and autograd they are rounded to the format of the product and widened again, two launches and half of
their bits: what a group of experts gets from its kernel (kernels/grouped_matmul.py) a single matrix gets here. Layers
of one input are one product in each direction: with weights of 128 × 128 one of 16,384 rows takes 4 to 7 µs on an H200,
of which one or two are multiplying and moving.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_train.kernels.cut import is_cut
from moe_train.precision import grouped
from moe_train.precision.narrowed import narrowed

_NARROW = (torch.bfloat16, torch.float16)


def takes(x: Tensor, dtype: torch.dtype, *weights: Tensor) -> bool:
    """Whether it is used: on NVIDIA's GPUs, whole matrices in FP32, and not within what torch.compile traces."""
    return (
        grouped.widens_as_it_multiplies(x.device)
        and dtype in _NARROW
        and all(weight.dtype == torch.float32 and weight.device == x.device for weight in weights)
        and not any(map(is_cut, weights))
        and not torch.compiler.is_compiling()
    )


class LinearsOfRows(torch.autograd.Function):
    """x (m, i) in BF16 or FP16 by weights (o, i) in FP32 → (m, o) like x of each, parts of one matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        narrow = narrowed(x.dtype, *weights)
        ctx.save_for_backward(x, narrow)
        ctx.sizes = [len(weight) for weight in weights]
        return tuple(grouped.product(x, narrow, None).split(ctx.sizes, dim=1))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, narrow = ctx.saved_tensors
        grad_mo = grad_outputs[0] if len(grad_outputs) == 1 else torch.cat(grad_outputs, dim=1)
        needs_x, *needs_weights = ctx.needs_input_grad
        grad_x = grouped.input_gradient(grad_mo, narrow, None) if needs_x else None
        if not any(needs_weights):
            return grad_x, *(None for _ in needs_weights)
        found = grouped.weight_gradient(grad_mo, x, None, torch.float32).split(ctx.sizes)
        return grad_x, *(grad if needed else None for grad, needed in zip(found, needs_weights, strict=True))
