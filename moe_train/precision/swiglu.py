"""SwiGLU between its two products, keeping what goes into it and making its result again in the backward pass.

    gate_up (n, 2f) = x · w₁ᵀ        h (n, f) = silu(gate) · up · a row's weight        y = h · w₂ᵀ

Left to autograd, four or five tensors of width f are kept for each row; here gate_up alone, from which h is a few
cheap operations (DeepSeek-V3, arXiv 2412.19437, section 3.3.3). Rows may be in groups, an expert's each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.precision import grouped


def swiglu(gate_up: Tensor, weight_n1: Tensor | None) -> Tensor:
    """(n, 2f) and (n, 1) → (n, f)."""
    gate, up = gate_up.chunk(2, dim=-1)
    h = _silu(gate).mul_(up)
    return h if weight_n1 is None else h.mul_(weight_n1)


def swiglu_backward(grad_h: Tensor, gate_up: Tensor, weight_n1: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of gate_up (n, 2f) and of the rows' weights (n, 1)."""
    gate, up = gate_up.chunk(2, dim=-1)
    activated = _silu(gate)
    grad_weight = None
    if weight_n1 is not None:
        grad_weight = (activated * up).mul_(grad_h).sum(-1, keepdim=True)
        grad_h = grad_h * weight_n1
    grad_gate_up = torch.empty_like(gate_up)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
    torch.mul(grad_h, activated, out=grad_up)
    grad_activated = activated.copy_(grad_h).mul_(up)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad_activated, _beside(gate)))
    return grad_gate_up, grad_weight


def _silu(gate: Tensor) -> Tensor:
    return F.silu(gate) if gate.is_cuda else F.silu(_beside(gate), inplace=True)


def _beside(gate: Tensor) -> Tensor:
    """Half of a row, as it is on a GPU; copied on a CPU, where silu is three times slower on rows that lie apart."""
    return gate if gate.is_cuda else gate.clone(memory_format=torch.contiguous_format)


class SwiGLUProducts(torch.autograd.Function):
    """x (n, d), w₁ (2f, d) or (e, 2f, d), w₂ (d, f) or (e, d, f), all in one format → (n, d)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, first: Tensor, second: Tensor, weight_n1: Tensor | None, ends_e: Tensor | None
    ) -> Tensor:
        gate_up = grouped.product(x, first, ends_e)
        ctx.save_for_backward(x, first, second, weight_n1, ends_e, gate_up)
        return grouped.product(swiglu(gate_up, weight_n1), second, ends_e)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, first, second, weight_n1, ends_e, gate_up = ctx.saved_tensors
        grad_y = grad_outputs[0].contiguous()
        needs_x, needs_first, needs_second = ctx.needs_input_grad[:3]
        grad_second = None
        if needs_second:
            grad_second = grouped.weight_gradient(grad_y, swiglu(gate_up, weight_n1), ends_e)
        grad_h = grouped.input_gradient(grad_y, second, ends_e)
        grad_gate_up, grad_weight = swiglu_backward(grad_h, gate_up, weight_n1)
        del grad_h, gate_up
        grad_first = grouped.weight_gradient(grad_gate_up, x, ends_e) if needs_first else None
        grad_x = grouped.input_gradient(grad_gate_up, first, ends_e) if needs_x else None
        return grad_x, grad_first, grad_second, grad_weight, None
