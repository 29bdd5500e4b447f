"""The router's linear layer by router.c: all of it in FP32."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_train.kernels.cpu import library
from moe_train.uncompiled import operator

_PARTS = 8  # of the rows: gradients of the weight are added up in the same order on any number of cores
_FEWEST_ROWS = 64


class _Arguments(ctypes.Structure):
    """`Router` in router.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "inner", "outer", "parts")),
        *((name, ctypes.c_void_p) for name in ("next", "x", "weight", "y", "grad_y", "grad_x", "grad_weight")),
    ]


def takes(x_td: Tensor, weight_ed: Tensor) -> bool:
    """Whether it is used, and can do it: FP32 on a CPU, rows enough."""
    return (
        library.in_use() is not None
        and x_td.device.type == "cpu"
        and x_td.dtype == weight_ed.dtype == torch.float32
        and len(x_td) >= _FEWEST_ROWS
    )


class RouterLinear(torch.autograd.Function):
    """x (t, d) by weight (e, d) → (t, e)."""

    @staticmethod
    def forward(ctx: Any, x_td: Tensor, weight_ed: Tensor) -> Tensor:
        ctx.save_for_backward(x_td, weight_ed)
        y: Tensor = router_forward(x_td, weight_ed)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_td, weight_ed = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        return (
            router_input_gradient(grad_outputs[0], weight_ed) if needs_x else None,
            router_weight_gradient(grad_outputs[0], x_td) if needs_weight else None,
        )


def _call(name: str, rows: int, inner: int, outer: int, **tensors: Tensor) -> None:
    places = {key: x.data_ptr() for key, x in tensors.items()}
    library.call_on_cores(name, _Arguments(rows=rows, inner=inner, outer=outer, parts=_PARTS, **places))


@operator("moe_train::router_forward")
def router_forward(x_td: Tensor, weight_ed: Tensor) -> Tensor:
    y: Tensor = _like_y(x_td, weight_ed)
    rows, inner = x_td.shape
    _call("router_forward", rows, inner, len(weight_ed), x=x_td.contiguous(), weight=weight_ed.contiguous(), y=y)
    return y


@router_forward.register_fake
def _like_y(x_td: Tensor, weight_ed: Tensor) -> Tensor:
    return x_td.new_empty(len(x_td), len(weight_ed))


@operator("moe_train::router_input_gradient")
def router_input_gradient(grad_te: Tensor, weight_ed: Tensor) -> Tensor:
    grad_x: Tensor = _like_x(grad_te, weight_ed)
    tensors = {"grad_y": grad_te.contiguous(), "weight": weight_ed.contiguous(), "grad_x": grad_x}
    _call("router_input_gradient", len(grad_te), weight_ed.shape[1], len(weight_ed), **tensors)
    return grad_x


@router_input_gradient.register_fake
def _like_x(grad_te: Tensor, weight_ed: Tensor) -> Tensor:
    return grad_te.new_empty(len(grad_te), weight_ed.shape[1])


@operator("moe_train::router_weight_gradient")
def router_weight_gradient(grad_te: Tensor, x_td: Tensor) -> Tensor:
    parts = x_td.new_empty(_PARTS, grad_te.shape[1], x_td.shape[1])
    tensors = {"grad_y": grad_te.contiguous(), "x": x_td.contiguous(), "grad_weight": parts}
    rows, inner = x_td.shape
    _call("router_weight_gradient", rows, inner, grad_te.shape[1], **tensors)
    return parts.sum(0)


@router_weight_gradient.register_fake
def _like_weight(grad_te: Tensor, x_td: Tensor) -> Tensor:
    return grad_te.new_empty(grad_te.shape[1], x_td.shape[1])


@register_flop_formula([torch.ops.moe_train.router_forward])
def _forward_flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    """For torch's counter, which does not look into operators."""
    return 2 * x[0] * x[1] * weight[0]


@register_flop_formula([torch.ops.moe_train.router_input_gradient])
def _input_flops(grad: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * grad[0] * grad[1] * weight[1]


@register_flop_formula([torch.ops.moe_train.router_weight_gradient])
def _weight_flops(grad: torch.Size, x: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * grad[0] * grad[1] * x[1]
