"""SwiGLU between its two products, keeping what goes into it and making its result again in the backward pass.

    gate_up (n, 2f) = x · w₁ᵀ        h (n, f) = silu(gate) · up · a row's weight        y = h · w₂ᵀ

Left to autograd, four or five tensors of width f are kept for each row; here gate_up alone, from which h is a few
cheap operations (DeepSeek-V3, arXiv 2412.19437, section 3.3.3). Rows may be in groups, an expert's each. On GPUs each
pass is one kernel (kernels/swiglu.py), an operator of torch's library; elsewhere torch's operations.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.precision import grouped, support
from moe_train.precision.narrowed import narrowed
from moe_train.uncompiled import operator

_WIDE = torch.float32
_IN_KERNELS = (torch.float32, torch.bfloat16, torch.float16)


def swiglu(gate_up: Tensor, weight_n1: Tensor | None) -> Tensor:
    """(n, 2f) and (n, 1) → (n, f)."""
    if _runs_kernels(gate_up):
        activated: Tensor = gated_swiglu(gate_up, weight_n1)
        return activated
    gate, up = gate_up.chunk(2, dim=-1)
    h = (F.silu(gate) if gate.is_cuda else F.silu(_beside(gate), inplace=True)).mul_(up)
    return h if weight_n1 is None else h.mul_(weight_n1)


def _runs_kernels(gate_up: Tensor) -> bool:
    return gate_up.dtype in _IN_KERNELS and support.runs_triton(gate_up.device)


@operator("moe_train::gated_swiglu")
def gated_swiglu(gate_up: Tensor, weight_n1: Tensor | None) -> Tensor:
    """`swiglu` by the kernel."""
    from moe_train.kernels import swiglu as kernels  # Triton is not everywhere

    return kernels.swiglu(gate_up, weight_n1)


@gated_swiglu.register_fake
def _(gate_up: Tensor, weight_n1: Tensor | None) -> Tensor:
    return gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)


@operator("moe_train::gated_swiglu_gradients")
def gated_swiglu_gradients(grad_h: Tensor, gate_up: Tensor, weight_n1: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """By the kernel: gradients of gate_up and, in FP32, of the rows' weights (empty without), and the result again."""
    from moe_train.kernels import swiglu as kernels  # Triton is not everywhere

    grad_gate_up, grad_weight, h = kernels.swiglu_backward_and_forward(grad_h, gate_up, weight_n1)
    return grad_gate_up, _no_weights(gate_up) if grad_weight is None else grad_weight, h


@gated_swiglu_gradients.register_fake
def _(grad_h: Tensor, gate_up: Tensor, weight_n1: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight = _no_weights(gate_up) if weight_n1 is None else weight_n1.new_empty(weight_n1.shape, dtype=_WIDE)
    return gate_up.new_empty(gate_up.shape), grad_weight, grad_h.new_empty(grad_h.shape)


def _no_weights(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(0, dtype=_WIDE)


def _beside(gate: Tensor) -> Tensor:
    """Half of a row, as it is on a GPU; copied on a CPU, where silu is three times slower on rows that lie apart."""
    return gate if gate.is_cuda else gate.clone(memory_format=torch.contiguous_format)


class Remade:
    """In the backward pass: the result again, (n, f), and from the same operations the gradients."""

    def __init__(self, gate_up: Tensor) -> None:
        gate, self.up = gate_up.chunk(2, dim=-1)
        self.gate = _beside(gate)
        self.activated = F.silu(self.gate)
        self.joined = self.activated * self.up

    def result(self, weight_n1: Tensor | None) -> Tensor:
        return self.joined if weight_n1 is None else self.joined * weight_n1

    def gradients(self, grad_h: Tensor, weight_n1: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Of gate_up (n, 2f) and of the rows' weights (n, 1). Uses itself up."""
        grad_weight = None
        if weight_n1 is not None:
            grad_weight = self.joined.mul_(grad_h).sum(-1, keepdim=True)
            grad_h = grad_h * weight_n1
        del self.joined
        grad_up = self.activated.mul_(grad_h)
        del self.activated
        grad_gate = torch.ops.aten.silu_backward(grad_h * self.up, self.gate)
        return torch.cat((grad_gate, grad_up), dim=-1), grad_weight


class SwiGLUProducts(torch.autograd.Function):
    """x (n, d), w₁ (2f, d) or (e, 2f, d), w₂ (d, f) or (e, d, f) → (n, d), all products in the format of x.

    Weights of another format are rounded to it; their gradients are in their own.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, first: Tensor, second: Tensor, weight_n1: Tensor | None, ends_e: Tensor | None
    ) -> Tensor:
        ctx.weight_dtypes = first.dtype, second.dtype
        first, second = narrowed(x.dtype, first), narrowed(x.dtype, second)
        gate_up = grouped.product(x, first, ends_e)
        ctx.save_for_backward(x, first, second, weight_n1, ends_e, gate_up)
        return grouped.product(swiglu(gate_up, weight_n1), second, ends_e)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, first, second, weight_n1, ends_e, gate_up = ctx.saved_tensors
        grad_y = grad_outputs[0].contiguous()
        needs_x, needs_first, needs_second = ctx.needs_input_grad[:3]
        first_dtype, second_dtype = ctx.weight_dtypes
        grad_second = None
        if _runs_kernels(gate_up):
            grad_h = grouped.input_gradient(grad_y, second, ends_e)
            grad_gate_up, grad_weight, h = gated_swiglu_gradients(grad_h, gate_up, weight_n1)
            del grad_h, gate_up
            if needs_second:
                grad_second = grouped.weight_gradient(grad_y, h, ends_e, second_dtype)
            del h
            grad_weight = None if weight_n1 is None else grad_weight.to(weight_n1.dtype)
        else:
            remade = Remade(gate_up)
            if needs_second:
                grad_second = grouped.weight_gradient(grad_y, remade.result(weight_n1), ends_e, second_dtype)
            grad_h = grouped.input_gradient(grad_y, second, ends_e)
            grad_gate_up, grad_weight = remade.gradients(grad_h, weight_n1)
            del grad_h, gate_up, remade
        grad_first = grouped.weight_gradient(grad_gate_up, x, ends_e, first_dtype) if needs_first else None
        grad_x = grouped.input_gradient(grad_gate_up, first, ends_e) if needs_x else None
        return grad_x, grad_first, grad_second, grad_weight, None
