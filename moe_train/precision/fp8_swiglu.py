"""SwiGLU between its two products in FP8: precision/swiglu.py with the operands of precision/fp8.py.

What is kept of a row until the backward pass is the FP8 form of its input, and gate_up: in FP8 too where the recipe
says so (`swiglu_input`; DeepSeek-V3, arXiv 2412.19437, section 3.3.3), else in the compute format. The backend rounds
SwiGLU's result while it makes it, and gate_up's gradient likewise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_train.kernels.layouts import DTYPES, PIECE, Rows
from moe_train.precision.formats import compute_dtype
from moe_train.precision.fp8 import Fp8Layer, ends_of, layer_of, owner_of, stacked
from moe_train.uncompiled import operator


def fp8_swiglu(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    row_weight: Tensor | None,
    ends_e: Tensor | None,
    layers: tuple[Fp8Layer, Fp8Layer],
    source_n: Tensor | None = None,
    place_tk: Tensor | None = None,
) -> Tensor:
    """As `swiglu_linear` of precision/matmul.py.

    With source_n x is (t, d), of which row source_n[i] is row i in groups, and so is the result: for each token the sum
    of the rows at its places. Where the first layer `reads_tokens`.
    """
    dtype, (first, second) = compute_dtype(x), layers
    swiglu_input = first.recipe.swiglu_input
    x_nd = x.flatten(0, -2).to(dtype)
    kept = first.input(x_nd, ends_e, source_n)
    out: Tensor = torch.ops.moe_train.fp8_swiglu_forward(
        x_nd,
        kept.values,
        kept.scales,
        gate_up_weight,
        down_weight,
        None if row_weight is None else row_weight.to(dtype),
        ends_e,
        source_n,
        place_tk,
        first.key,
        second.key,
        None if swiglu_input is None else DTYPES[swiglu_input.format],
    )[0]
    return out.view(*x.shape[:-1], down_weight.shape[-2])


def _summed(y_nd: Tensor, place_tk: Tensor | None, layer: Fp8Layer) -> Tensor:
    """By tokens, where these were read by an index."""
    return y_nd if place_tk is None else layer.by_token.collect(y_nd, place_tk)


@operator("moe_train::fp8_swiglu_forward")
def _forward(
    x_nd: Tensor,
    x_values: Tensor,
    x_scales: Tensor,
    first_weight: Tensor,
    second_weight: Tensor,
    row_weight: Tensor | None,
    ends_e: Tensor | None,
    source_n: Tensor | None,
    place_tk: Tensor | None,
    first_layer: int,
    second_layer: int,
    gate_up_kept_in: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and gate_up as it is kept (scales empty unless in FP8). x: for its gradient, and as multiplied."""
    first, second = layer_of(first_layer), layer_of(second_layer)
    recipe, backend, ends = first.recipe, first.backend, ends_of(x_nd, ends_e)
    weights = first.weights(stacked(first_weight), backward=False)
    gate_up = first.product(Rows(x_values, x_scales), weights, ends, x_nd.dtype, source_n)
    h = second.swiglu(gate_up, row_weight, ends)
    y = backend.product(h, second.weights(stacked(second_weight), backward=False), ends, x_nd.dtype)
    y = _summed(y, place_tk, first)
    if recipe.swiglu_input is None:
        return y, gate_up, gate_up.new_empty(0, dtype=torch.float32)
    kept = first.swiglu_input(gate_up, recipe.swiglu_input, ends)
    return y, kept.values, kept.scales


@_forward.register_fake
def _(
    x_nd: Tensor,
    x_values: Tensor,
    x_scales: Tensor,
    first_weight: Tensor,
    second_weight: Tensor,
    row_weight: Tensor | None,
    ends_e: Tensor | None,
    source_n: Tensor | None,
    place_tk: Tensor | None,
    first_layer: int,
    second_layer: int,
    gate_up_kept_in: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = len(x_nd if source_n is None else source_n), first_weight.shape[-2]
    scales = (0,) if gate_up_kept_in is None else (rows, (width + PIECE - 1) // PIECE)
    return (
        x_nd.new_empty(len(x_nd), second_weight.shape[-2]),
        x_nd.new_empty(rows, width, dtype=gate_up_kept_in or x_nd.dtype),
        x_nd.new_empty(scales, dtype=torch.float32),
    )


@operator("moe_train::fp8_swiglu_backward")
def _backward(
    grad_nd: Tensor,
    first_weight: Tensor,
    second_weight: Tensor,
    row_weight: Tensor | None,
    ends_e: Tensor | None,
    source_n: Tensor | None,
    place_tk: Tensor | None,
    x_values: Tensor,
    x_scales: Tensor,
    gate_up_values: Tensor,
    gate_up_scales: Tensor,
    first_layer: int,
    second_layer: int,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, both weights (FP32) and the rows' weights; empty where not needed."""
    first, second = layer_of(first_layer), layer_of(second_layer)
    recipe, backend, ends = first.recipe, first.backend, ends_of(grad_nd, ends_e)
    nothing, nothing_wide = grad_nd.new_empty(0), grad_nd.new_empty(0, dtype=torch.float32)
    gate_up = gate_up_values
    if recipe.swiglu_input is not None:
        gate_up = backend.dequantize(Rows(gate_up_values, gate_up_scales), grad_nd.dtype)
    rows, columns = second.quantized_gradient(grad_nd, ends, source_n, rows=True, columns=needs_weights)
    assert rows is not None
    grad_second = nothing_wide
    if columns is not None:
        h = second.swiglu(gate_up, row_weight, ends)
        grad_second = backend.weight_product(columns, second.along_tokens(h, ends)).view_as(second_weight)
        del h, columns
    grad_h = backend.product(rows, second.weights(stacked(second_weight), backward=True), ends, grad_nd.dtype)
    rows, columns, grad_row_weight = first.swiglu_gradient(
        grad_h, gate_up, row_weight, ends, rows=needs_x, columns=needs_weights
    )
    del grad_h, gate_up
    grad_x, grad_first = nothing, nothing_wide
    if columns is not None:
        x = first.along_tokens(Rows(x_values, x_scales), ends, source_n)
        grad_first = backend.weight_product(columns, x).view_as(first_weight)
    if rows is not None:
        grad_x = backend.product(rows, first.weights(stacked(first_weight), backward=True), ends, grad_nd.dtype)
        grad_x = _summed(grad_x, place_tk, first)
    if row_weight is None or grad_row_weight is None:
        return grad_x, grad_first, grad_second, nothing
    return grad_x, grad_first, grad_second, grad_row_weight.to(row_weight.dtype)


@_backward.register_fake
def _(
    grad_nd: Tensor,
    first_weight: Tensor,
    second_weight: Tensor,
    row_weight: Tensor | None,
    ends_e: Tensor | None,
    source_n: Tensor | None,
    place_tk: Tensor | None,
    x_values: Tensor,
    x_scales: Tensor,
    gate_up_values: Tensor,
    gate_up_scales: Tensor,
    first_layer: int,
    second_layer: int,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        grad_nd.new_empty(x_values.shape if needs_x else (0,)),
        first_weight.new_empty(first_weight.shape if needs_weights else (0,), dtype=torch.float32),
        second_weight.new_empty(second_weight.shape if needs_weights else (0,), dtype=torch.float32),
        grad_nd.new_empty((0,) if row_weight is None else row_weight.shape),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, x_values, x_scales, *kept, ctx.first, ctx.second, _ = inputs
    ctx.owners = owner_of(ctx.first), owner_of(ctx.second)
    _, *made = output
    ctx.mark_non_differentiable(*made)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*kept, x_values, x_scales, *made)


def _differentiate(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    needs_x, _, _, needs_first, needs_second, needs_row_weight = ctx.needs_input_grad[:6]
    grad_x, grad_first, grad_second, grad_row_weight = torch.ops.moe_train.fp8_swiglu_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.first, ctx.second, needs_x, needs_first or needs_second
    )
    return (
        grad_x if needs_x else None,
        None,
        None,
        grad_first if needs_first else None,
        grad_second if needs_second else None,
        grad_row_weight if needs_row_weight else None,
        *(None,) * 6,
    )


_forward.register_autograd(_differentiate, setup_context=_keep)
