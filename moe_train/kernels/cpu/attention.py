"""Causal attention by attention.c: precision and shapes are those of model/cpu_attention.py, which it stands in for."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_train.kernels.cpu import library

_SIZES = ("heads", "shared", "length", "features", "values")
_TENSORS = ("next", "q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")


class _Arguments(ctypes.Structure):
    """`Attention` in attention.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_void_p) for name in _TENSORS),
        ("scale", ctypes.c_float),
    ]


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether they are used, and can do it: BF16 on a CPU, heads of even size. What does not fit is left to torch."""
    batch, groups, t, _ = v.shape
    return (
        library.in_use() is not None
        and all(x.device.type == "cpu" and x.dtype == torch.bfloat16 for x in (q, k, v))
        and q.shape[-1] % 2 == v.shape[-1] % 2 == 0
        and k.shape == (batch, groups, t, q.shape[-1])
        and q.shape[0] == batch
        and q.shape[1] % groups == 0
    )


class CausalAttention(torch.autograd.Function):
    """q (b, h, t, c), k (b, g, t, c), v (b, g, t, c_v), h a multiple of g → (b, h, t, c_v)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        out: Tensor = torch.ops.moe_train.attention_forward(q, k, v, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        gradients: tuple[Tensor, Tensor, Tensor]
        gradients = torch.ops.moe_train.attention_backward(grad_outputs[0], *ctx.saved_tensors, ctx.scale)
        return (*gradients, None)


def _call(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float, **others: Tensor) -> None:
    tensors = {"q": q.contiguous(), "k": k.contiguous(), "v": v.contiguous(), **others}
    sizes = (k.shape[0] * k.shape[1], q.shape[1] // k.shape[1], q.shape[2], q.shape[3], v.shape[3])
    arguments = _Arguments(*sizes, **{key: x.data_ptr() for key, x in tensors.items()}, scale=scale)
    library.call_on_cores(name, arguments)


@torch.library.custom_op("moe_train::attention_forward", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    out: Tensor = _like_result(q, k, v, scale)
    _call("attention_forward", q, k, v, scale, out=out)
    return out


@_forward.register_fake
def _like_result(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


@torch.library.custom_op("moe_train::attention_backward", mutates_args=())
def _backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    made: tuple[Tensor, Tensor, Tensor]
    made = _like_gradients(grad_out, q, k, v, scale)
    _call(
        "attention_backward",
        q,
        k,
        v,
        scale,
        grad_out=grad_out.contiguous(),
        **dict(zip(("grad_q", "grad_k", "grad_v"), made)),
    )
    return made


@_backward.register_fake
def _like_gradients(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)  # one after another, whatever q's strides


@register_flop_formula([torch.ops.moe_train.attention_forward])
def _forward_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    """For torch's counter: all scores, as it counts torch's own attention."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


@register_flop_formula([torch.ops.moe_train.attention_backward])
def _backward_flops(grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * q[0] * q[1] * q[2] * k[2] * (3 * q[3] + 2 * v[3])
