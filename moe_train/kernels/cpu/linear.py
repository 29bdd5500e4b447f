"""Linear layers, and SwiGLU between two of them, by linear.c: BF16 rows, FP32 weights, FP32 gradients of these."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_train.kernels.cpu import library
from moe_train.uncompiled import operator

_FEWEST_ROWS = 64  # for which packing the weight pays
_MOST_WEIGHTS = 2**18  # whose gradients in FP32 stay in the second cache, 1 MB
_CHUNK = 504  # rows that are packed at a time for the weight's gradient


class _Linear(ctypes.Structure):
    """`Linear` in linear.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "inner", "outer", "parts")),
        *((name, ctypes.c_void_p) for name in ("next", "x", "weight", "y", "grad_y", "grad_x")),
        *((name, ctypes.c_void_p) for name in ("grad_weight", "packed", "done")),
    ]


class _SwiGLU(ctypes.Structure):
    """`SwiGLU` in linear.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "width", "parts")),
        *((name, ctypes.c_void_p) for name in ("next", "gate_up", "h", "grad_h", "grad_gate_up")),
    ]


def takes(x: Tensor, *weights: Tensor) -> bool:
    """Whether they are used, and can do it: rows enough on a CPU, weights in FP32, even sizes. x: in any format.

    Sizes that do not go together are left to torch, which refuses them.
    """
    return (
        library.in_use() is not None
        and x.device.type == "cpu"
        and x.numel() >= _FEWEST_ROWS * x.shape[-1]
        and all(w.device == x.device and w.dtype == torch.float32 for w in weights)
        and all(w.shape[0] % 2 == w.shape[1] % 2 == 0 for w in weights)
        and x.shape[-1] == weights[0].shape[1]
        and (len(weights) == 1 or weights[0].shape[0] == 2 * weights[1].shape[1])
    )


class LinearOfRows(torch.autograd.Function):
    """x (m, i) in BF16 by weight (o, i) in FP32 → (m, o) in BF16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        y: Tensor = linear_forward(x, weight)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        if needs_x and needs_weight and weight.numel() <= _MOST_WEIGHTS:
            grad_x, grad_weight = linear_gradients(grad_outputs[0], x, weight)
            return grad_x, grad_weight
        return (
            linear_input_gradient(grad_outputs[0], weight) if needs_x else None,
            linear_weight_gradient(grad_outputs[0], x) if needs_weight else None,
        )


class SwiGLUOfRows(torch.autograd.Function):
    """x (m, d) in BF16, w₁ (2f, d) and w₂ (d, f) in FP32 → (m, d). What is kept is x and (m, 2f), as in swiglu.py."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        gate_up = linear_forward(x, first)
        ctx.save_for_backward(x, first, second, gate_up)
        y: Tensor = linear_forward(swiglu_forward(gate_up), second)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, first, second, gate_up = ctx.saved_tensors
        needs_x, needs_first, needs_second = ctx.needs_input_grad
        h, grad_gate_up = swiglu_backward(gate_up, linear_input_gradient(grad_outputs[0], second))
        return (
            linear_input_gradient(grad_gate_up, first) if needs_x else None,
            linear_weight_gradient(grad_gate_up, x) if needs_first else None,
            linear_weight_gradient(grad_outputs[0], h) if needs_second else None,
        )


def _call(kind: type[ctypes.Structure], name: str, sizes: dict[str, int], **tensors: Tensor) -> None:
    places = {key: x.data_ptr() for key, x in tensors.items()}
    library.call_on_cores(name, kind(**({"parts": torch.get_num_threads()} | sizes), **places))


@operator("moe_train::linear_forward")
def linear_forward(x: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = _like_y(x, weight)
    sizes = {"rows": len(x), "inner": x.shape[1], "outer": len(weight)}
    _call(_Linear, "linear_forward", sizes, x=x.contiguous(), weight=weight.contiguous(), y=y)
    return y


@linear_forward.register_fake
def _like_y(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight))


@operator("moe_train::linear_input_gradient")
def linear_input_gradient(grad_y: Tensor, weight: Tensor) -> Tensor:
    grad_x: Tensor = _like_x(grad_y, weight)
    sizes = {"rows": len(grad_y), "inner": weight.shape[1], "outer": len(weight)}
    tensors = {"grad_y": grad_y.contiguous(), "weight": weight.contiguous(), "grad_x": grad_x}
    _call(_Linear, "linear_input_gradient", sizes, **tensors)
    return grad_x


@linear_input_gradient.register_fake
def _like_x(grad_y: Tensor, weight: Tensor) -> Tensor:
    return grad_y.new_empty(len(grad_y), weight.shape[1])


@operator("moe_train::linear_weight_gradient")
def linear_weight_gradient(grad_y: Tensor, x: Tensor) -> Tensor:
    (t, inner), outer = x.shape, grad_y.shape[1]
    grad_weight = grad_y.new_empty(outer, library.up(inner, library.REGISTER), dtype=torch.float32)
    columns = library.up(inner, library.PANEL) + library.up(outer, library.PANEL)
    tensors = {"grad_y": grad_y.contiguous(), "x": x.contiguous(), "grad_weight": grad_weight}
    tensors |= {
        "packed": x.new_empty(2 * _CHUNK * columns),
        "done": torch.zeros(2 * -(-t // _CHUNK), dtype=torch.int64),
    }
    _call(_Linear, "linear_weight_gradient", {"rows": t, "inner": inner, "outer": outer}, **tensors)
    return grad_weight[:, :inner].contiguous()


@linear_weight_gradient.register_fake
def _like_weight(grad_y: Tensor, x: Tensor) -> Tensor:
    return grad_y.new_empty(grad_y.shape[1], x.shape[1], dtype=torch.float32)


@operator("moe_train::linear_gradients")
def linear_gradients(grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both, for a weight whose gradient stays in the cache of a core."""
    grad_x, grad_weight = _like_gradients(grad_y, x, weight)
    sizes = {"rows": len(x), "inner": x.shape[1], "outer": len(weight), "parts": library.parts(len(x))}
    parts = weight.new_empty(sizes["parts"], *weight.shape)
    tensors = {"grad_y": grad_y.contiguous(), "x": x.contiguous(), "weight": weight.contiguous()}
    _call(_Linear, "linear_gradients", sizes, **tensors, grad_x=grad_x, grad_weight=parts)
    torch.sum(parts, 0, out=grad_weight)
    return grad_x, grad_weight


@linear_gradients.register_fake
def _like_gradients(grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return _like_x(grad_y, weight), _like_weight(grad_y, x)


@operator("moe_train::swiglu_forward")
def swiglu_forward(gate_up: Tensor) -> Tensor:
    """silu(gate) · up: (m, 2f) → (m, f)."""
    h: Tensor = _like_h(gate_up)
    sizes = {"rows": len(gate_up), "width": gate_up.shape[1] // 2}
    _call(_SwiGLU, "swiglu_forward", sizes, gate_up=gate_up.contiguous(), h=h)
    return h


@swiglu_forward.register_fake
def _like_h(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)


@operator("moe_train::swiglu_backward")
def swiglu_backward(gate_up: Tensor, grad_h: Tensor) -> tuple[Tensor, Tensor]:
    """h again, and the gradient of (m, 2f)."""
    made: tuple[Tensor, Tensor] = _like_both(gate_up, grad_h)
    sizes = {"rows": len(gate_up), "width": gate_up.shape[1] // 2}
    tensors = {"gate_up": gate_up.contiguous(), "grad_h": grad_h.contiguous(), "h": made[0], "grad_gate_up": made[1]}
    _call(_SwiGLU, "swiglu_backward", sizes, **tensors)
    return made


@swiglu_backward.register_fake
def _like_both(gate_up: Tensor, grad_h: Tensor) -> tuple[Tensor, Tensor]:
    return grad_h.new_empty(grad_h.shape), gate_up.new_empty(gate_up.shape)


@register_flop_formula([torch.ops.moe_train.linear_forward])
def _forward_flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    """For torch's counter, which does not look into operators."""
    return 2 * x[0] * x[1] * weight[0]


@register_flop_formula([torch.ops.moe_train.linear_input_gradient])
def _input_flops(grad: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * grad[0] * grad[1] * weight[1]


@register_flop_formula([torch.ops.moe_train.linear_gradients])
def _both_flops(grad: torch.Size, x: torch.Size, *_: Any, **__: Any) -> int:
    return 4 * grad[0] * grad[1] * x[1]


@register_flop_formula([torch.ops.moe_train.linear_weight_gradient])
def _weight_flops(grad: torch.Size, x: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * grad[0] * grad[1] * x[1]
