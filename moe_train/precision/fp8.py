"""Linear layers in FP8: all three products of a layer, forward and backward, as a recipe says.

    forward          y  (t, o) = x  (t, i) · w  (o, i)ᵀ     sums over the inputs i
    input gradient   dx (t, i) = dy (t, o) · wᵀ (i, o)ᵀ     sums over the outputs o
    weight gradient  dw (o, i) = dyᵀ (o, t) · xᵀ (i, t)ᵀ    sums over the tokens t

Operands are rounded to FP8 and multiplied as FP32 numbers: what the recipe computes, on any device, without its speed.
What is kept of an input until the backward pass is its FP8 form, from which the weight gradient's operand is rounded
again, as in DeepSeek-V3 (arXiv 2412.19437, section 3.3.3). Weights are rounded once a step, whatever the number of
micro-batches: inside `holding_weights`, which ends before the optimizer changes them. A tensor's version counter would
not do: torch's fused AdamW leaves it as it is. In a grouped product every group is a product of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moe_train.config import Fp8Config, OperandConfig
from moe_train.precision.accumulate import product
from moe_train.precision.formats import compute_dtype
from moe_train.precision.quantize import Quantized, quantize

_held: object | None = None  # the step in progress, while weights cannot change


@contextlib.contextmanager
def holding_weights() -> Iterator[None]:
    """Nothing in here changes a weight: each is rounded once."""
    global _held
    _held = object()
    try:
        yield
    finally:
        _held = None


class Fp8Layer:
    """The products of one layer. `power_of_two_input`: the scales of its input are powers of two, whatever else is."""

    def __init__(self, recipe: Fp8Config, power_of_two_input: bool = False) -> None:
        self.recipe = recipe
        self.power_of_two_input = power_of_two_input
        self._weights: dict[str, tuple[object, Tensor]] = {}  # by direction, and the step they were rounded in

    def linear(self, x: Tensor, weight_oi: Tensor) -> Tensor:
        """x (…, in), weight (out, in) → (…, out) in the compute format."""
        rows = x.flatten(0, -2)
        out: Tensor = _Fp8Grouped.apply(rows, weight_oi.unsqueeze(0), [len(rows)], self)  # type: ignore[no-untyped-call]
        return out.view(*x.shape[:-1], -1)

    def grouped_linear(self, x_ni: Tensor, weight_eoi: Tensor, ends_e: Tensor) -> Tensor:
        """Rows of group e times weight_eoi[e] → (n, out); ends_e is read on the host."""
        out: Tensor = _Fp8Grouped.apply(x_ni, weight_eoi, ends_e.tolist(), self)  # type: ignore[no-untyped-call]
        return out

    def quantized_input(self, x: Tensor, operand: OperandConfig) -> Quantized:
        return quantize(x, operand, power_of_two=self.power_of_two_input or operand.power_of_two)

    def weight(self, weight_eoi: Tensor, direction: Literal["forward", "input_gradient"]) -> Tensor:
        """FP32 values of the weight as `direction` rounds it."""
        step, rounded = self._weights.get(direction, (None, None))
        if _held is not None and rounded is not None and step is _held:
            return rounded
        forward = direction == "forward"
        operand = self.recipe.forward.weight if forward else self.recipe.input_gradient.weight
        rounded = quantize(weight_eoi if forward else weight_eoi.mT, operand).dequantized()
        if _held is not None:
            self._weights[direction] = (_held, rounded)
        else:
            self._weights.clear()
        return rounded


class _Saved(NamedTuple):
    """One group's input as it is kept."""

    start: int
    end: int
    piece: tuple[int, int]


class _Fp8Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ni: Tensor, weight_eoi: Tensor, ends: list[int], layer: Fp8Layer) -> Tensor:
        dtype, recipe = compute_dtype(x_ni), layer.recipe
        weight = layer.weight(weight_eoi, "forward")
        narrow = x_ni.to(dtype)
        out = x_ni.new_zeros(len(x_ni), weight_eoi.shape[1], dtype=dtype)
        ctx.groups, saved = [], []
        for group, (start, end) in enumerate(_bounds(ends)):
            if end > start:
                x = layer.quantized_input(narrow[start:end], recipe.forward.activation)
                out[start:end] = product(x.dequantized(), weight[group], recipe.accumulation).to(dtype)
                ctx.groups.append((group, _Saved(start, end, x.piece)))
                saved += [x.values, x.scales]
        ctx.save_for_backward(weight_eoi, *saved)
        ctx.layer, ctx.dtype, ctx.input_dtype = layer, dtype, x_ni.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight_eoi, *saved = ctx.saved_tensors
        layer: Fp8Layer = ctx.layer
        recipe = layer.recipe
        grad_no = grad_outputs[0]
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_no.new_zeros(len(grad_no), weight_eoi.shape[2], dtype=ctx.input_dtype)
            weight = layer.weight(weight_eoi, "input_gradient")
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight_eoi)  # groups without rows have a gradient of zero
        for index, (group, (start, end, piece)) in enumerate(ctx.groups):
            grad = grad_no[start:end]
            if grad_x is not None:
                rounded = quantize(grad, recipe.input_gradient.gradient).dequantized()
                grad_x[start:end] = product(rounded, weight[group], recipe.accumulation).to(ctx.dtype)
            if grad_weight is not None:
                x = Quantized(saved[2 * index], saved[2 * index + 1], piece).dequantized()
                left = quantize(grad.mT, recipe.weight_gradient.gradient).dequantized()
                right = layer.quantized_input(x.mT, recipe.weight_gradient.activation).dequantized()
                grad_weight[group] = product(left, right, recipe.accumulation)
        return grad_x, grad_weight, None, None


def _bounds(ends: list[int]) -> list[tuple[int, int]]:
    return list(zip([0, *ends[:-1]], ends))
