"""The routed experts of a layer on a GPU, from tokens to tokens, in BF16 or FP16.

Where rows of tokens were copied once for every expert a token goes to (twice a step: again for the backward pass), the
first product reads them where they are, and so does whatever needs the gradient of a row's result, which is that of its
token's. Whose the products without an index are is for precision/grouped.py to say; the rest are grouped_matmul.py's.
Gradients of the weights leave the kernel in FP32. What is kept: the tokens, the weights as multiplied, and what SwiGLU
reads.

    n rows, one for each expert of each of t tokens, d hidden, f width of an expert, e experts, k experts of a token
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_train.kernels.cut import is_cut
from moe_train.precision import grouped, support
from moe_train.precision.narrowed import narrowed
from moe_train.uncompiled import operator

DTYPES = (torch.bfloat16, torch.float16)
_MULTIPLE = 8  # rows of 16 bytes: what torch's grouped matmul asks for


def takes(x_td: Tensor, gate_up_weight: Tensor, down_weight: Tensor) -> bool:
    """Whether they can be had: x in BF16 or FP16 on a GPU that Triton knows, sizes multiples of 8.

    Not while weights are cut over processes: FSDP2 gathers them where the module is called.
    """
    weights = (gate_up_weight, down_weight)
    return (
        x_td.dtype in DTYPES
        and support.runs_triton(x_td.device)
        and not any(map(is_cut, weights))
        and all(w.device == x_td.device and w.dtype in (torch.float32, x_td.dtype) for w in weights)
        and down_weight.shape[1] % _MULTIPLE == down_weight.shape[2] % _MULTIPLE == 0
    )


class RoutedExperts(torch.autograd.Function):
    """x (t, d), w₁ (e, 2f, d), w₂ (e, d, f) → (t, d) like x: each token's gated experts, summed, plus `added_td`.

    Row i of those sorted by expert is token `token_n[i]` with the gate `gate_n1[i]`; an expert's rows end before
    `ends_e[e]` (int32); `place_tk`: where a token's rows are among them. Weights of any format are rounded to that of x
    once, and their gradients are not rounded to it. added_td like x, or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_td: Tensor,
        first: Tensor,
        second: Tensor,
        gate_n1: Tensor,
        ends_e: Tensor,
        token_n: Tensor,
        place_tk: Tensor,
        added_td: Tensor | None,
    ) -> Tensor:
        from moe_train.kernels.collect import collect  # Triton is not everywhere

        ctx.weight_dtypes = first.dtype, second.dtype
        first, second = narrowed(x_td.dtype, first), narrowed(x_td.dtype, second)
        y_nd, gate_up = torch.ops.moe_train.routed_forward(x_td, first, second, gate_n1, ends_e, token_n)
        ctx.save_for_backward(x_td, first, second, gate_n1, ends_e, token_n, place_tk, gate_up)
        out: Tensor = collect(y_nd, place_tk, added_td)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        from moe_train.kernels.collect import collect

        x_td, first, second, gate_n1, ends_e, token_n, place_tk, gate_up = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[0]
        grad_td = grad_outputs[0].contiguous()
        grad_nd, grad_first, grad_second, grad_gate = torch.ops.moe_train.routed_backward(
            grad_td, x_td, first, second, gate_n1, ends_e, token_n, gate_up, *ctx.weight_dtypes, needs_x
        )
        del gate_up
        grad_x = collect(grad_nd, place_tk) if needs_x else None
        grad_added = grad_outputs[0] if ctx.needs_input_grad[7] else None
        return grad_x, grad_first, grad_second, grad_gate.to(gate_n1.dtype), None, None, None, grad_added


@operator("moe_train::routed_forward")
def _forward(
    x_td: Tensor, first: Tensor, second: Tensor, gate_n1: Tensor, ends_e: Tensor, token_n: Tensor
) -> tuple[Tensor, Tensor]:
    """Results by row (n, d), and what SwiGLU reads (n, 2f)."""
    from moe_train.kernels import grouped_matmul, swiglu

    gate_up = grouped_matmul.grouped_product(x_td, first, ends_e, token_n)
    return grouped.within_operator(swiglu.swiglu(gate_up, gate_n1), second, ends_e), gate_up


@_forward.register_fake
def _(
    x_td: Tensor, first: Tensor, second: Tensor, gate_n1: Tensor, ends_e: Tensor, token_n: Tensor
) -> tuple[Tensor, Tensor]:
    return x_td.new_empty(len(token_n), x_td.shape[1]), x_td.new_empty(len(token_n), first.shape[1])


@operator("moe_train::routed_backward")
def _backward(
    grad_td: Tensor,
    x_td: Tensor,
    first: Tensor,
    second: Tensor,
    gate_n1: Tensor,
    ends_e: Tensor,
    token_n: Tensor,
    gate_up: Tensor,
    first_dtype: torch.dtype,
    second_dtype: torch.dtype,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x by row (n, d; empty where not needed), of both weights, and in FP32 of the gates (n, 1)."""
    from moe_train.kernels import grouped_matmul, swiglu

    weight_product = grouped_matmul.grouped_weight_product
    grad_h = grouped_matmul.grouped_product(grad_td, second.mT, ends_e, token_n)
    grad_gate_up, grad_gate, h = swiglu.swiglu_backward_and_forward(grad_h, gate_up, gate_n1)
    assert grad_gate is not None
    del grad_h
    grad_second = weight_product(grad_td, h, ends_e, second_dtype, left_source_n=token_n)
    del h
    grad_first = weight_product(grad_gate_up, x_td, ends_e, first_dtype, right_source_n=token_n)
    grad_nd = grouped.within_operator(grad_gate_up, first.mT, ends_e) if needs_x else x_td.new_empty(0)
    return grad_nd, grad_first, grad_second, grad_gate


@_backward.register_fake
def _(
    grad_td: Tensor,
    x_td: Tensor,
    first: Tensor,
    second: Tensor,
    gate_n1: Tensor,
    ends_e: Tensor,
    token_n: Tensor,
    gate_up: Tensor,
    first_dtype: torch.dtype,
    second_dtype: torch.dtype,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x_td.new_empty((len(token_n), x_td.shape[1]) if needs_x else (0,)),
        first.new_empty(first.shape, dtype=first_dtype),
        second.new_empty(second.shape, dtype=second_dtype),
        gate_n1.new_empty(gate_n1.shape, dtype=torch.float32),
    )


@register_flop_formula([torch.ops.moe_train.routed_forward])
def _forward_flops(x: torch.Size, first: torch.Size, *others: Any, **_: Any) -> int:
    """For torch's counter, which does not look into operators: three products of d × f for a row."""
    rows: int = others[3][0]
    return 2 * rows * first[1] * first[2] * 3 // 2


@register_flop_formula([torch.ops.moe_train.routed_backward])
def _backward_flops(grad: torch.Size, x: torch.Size, first: torch.Size, *others: Any, **_: Any) -> int:
    rows: int = others[3][0]
    needs_x = others[-1]
    input_products = 3 if needs_x else 1
    return 2 * rows * first[1] * first[2] * (3 + input_products) // 2
