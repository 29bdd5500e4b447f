"""The product of a linear layer in FP8, and its two gradients, as operators of torch's library.

torch.compile takes them as they are, without a graph break. A layer is named by a number, since operators take no
objects; the graph keeps it alive.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_train.kernels.layouts import Rows
from moe_train.precision.formats import compute_dtype
from moe_train.precision.fp8 import Fp8Layer, ends_of, layer_of, owner_of, stacked
from moe_train.uncompiled import operator


def fp8_linear(x_ni: Tensor, weight: Tensor, ends_e: Tensor | None, layer: Fp8Layer) -> Tensor:
    """x (n, in) times weight (out, in), or of group e times weight[e] (e, out, in) → (n, out) in the compute format."""
    narrow = x_ni.to(compute_dtype(x_ni))
    kept = layer.input(narrow, ends_e)
    out: Tensor = torch.ops.moe_train.fp8_forward(narrow, kept.values, kept.scales, weight, ends_e, layer.key)
    return out


@operator("moe_train::fp8_forward")
def _forward(x_ni: Tensor, values: Tensor, scales: Tensor, weight: Tensor, ends_e: Tensor | None, layer: int) -> Tensor:
    """`values`, `scales`: x as it is multiplied; x itself is what a gradient is for."""
    own, ends = layer_of(layer), ends_of(x_ni, ends_e)
    return own.backend.product(Rows(values, scales), own.weights(stacked(weight), backward=False), ends, x_ni.dtype)


@_forward.register_fake
def _(x_ni: Tensor, values: Tensor, scales: Tensor, weight: Tensor, ends_e: Tensor | None, layer: int) -> Tensor:
    return x_ni.new_empty(len(x_ni), weight.shape[-2])


@operator("moe_train::fp8_backward")
def _backward(
    grad_no: Tensor,
    weight: Tensor,
    ends_e: Tensor | None,
    values: Tensor,
    scales: Tensor,
    layer: int,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the input (in that of the product's format) and of the weight (FP32); empty where not needed."""
    own = layer_of(layer)
    ends = ends_of(grad_no, ends_e)
    rows, columns = own.quantized_gradient(grad_no, ends, rows=needs_x, columns=needs_weight)
    grad_x, grad_weight = grad_no.new_empty(0), grad_no.new_empty(0, dtype=torch.float32)
    if rows is not None:
        grad_x = own.backend.product(rows, own.weights(stacked(weight), backward=True), ends, grad_no.dtype)
    if columns is not None:
        inputs = own.along_tokens(Rows(values, scales), ends)
        grad_weight = own.backend.weight_product(columns, inputs).view_as(weight)
    return grad_x, grad_weight


@_backward.register_fake
def _(
    grad_no: Tensor,
    weight: Tensor,
    ends_e: Tensor | None,
    values: Tensor,
    scales: Tensor,
    layer: int,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    grad_x = grad_no.new_empty(len(grad_no) if needs_x else 0, *weight.shape[-1:] * needs_x)
    return grad_x, weight.new_empty(weight.shape if needs_weight else 0, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, values, scales, weight, ends_e, ctx.layer = inputs
    ctx.owner = owner_of(ctx.layer)
    ctx.save_for_backward(weight, ends_e, values, scales)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None, None]:
    needs_x, _, _, needs_weight = ctx.needs_input_grad[:4]
    weight, ends_e, values, scales = ctx.saved_tensors
    grad_x, grad_weight = torch.ops.moe_train.fp8_backward(
        grad.contiguous(), weight, ends_e, values, scales, ctx.layer, needs_x, needs_weight
    )
    return grad_x if needs_x else None, None, None, grad_weight if needs_weight else None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)
