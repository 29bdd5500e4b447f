"""Causal attention by attention.c, which reads projections where they lie and turns what turns by position itself.

Queries (b, t, h · (n + m)): of each head n features that stay and m that turn. Keys and values (b, t, g · (n + w)): of
each key-value head n features of its key, then its value. Rotary keys (b, t, m), one for all heads, or (b, t, g · m).
So MLA hands over three projections; for GQA n is 0, values come in the second and keys in the third. Scores, softmax
and its gradient are FP32, as in model/cpu_attention.py; features are turned in FP32 and rounded once, as model/rope.py
does.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_train.kernels.cpu import library
from moe_train.uncompiled import operator

_SIZES = ("heads", "groups", "shared", "length", "plain", "turned", "values", "apart", "own")
_TENSORS = ("next", "q", "kv", "rotary", "cos", "sin", "out")
_BACKWARD = ("grad_out", "grad_q", "grad_kv", "grad_rotary", "parts", "done")


class _Arguments(ctypes.Structure):
    """`Attention` in attention.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_void_p) for name in (*_TENSORS, *_BACKWARD)),
        ("scale", ctypes.c_float),
    ]


@dataclass(frozen=True)
class _Sizes:
    """Of the shapes of all tensors, and the number of heads."""

    heads: int  # h
    groups: int  # g
    length: int  # t
    plain: int  # n
    turned: int  # m
    values: int  # w

    @classmethod
    def of(cls, q: torch.Size, kv: torch.Size, cos: torch.Size | None, heads: int, groups: int) -> Self:
        turned = q[2] // heads if cos is None else cos[1]
        plain = q[2] // heads - turned
        return cls(heads, groups, q[1], plain, turned, kv[2] // groups - plain)


def takes(q: Tensor, kv: Tensor, rotary: Tensor, turn: tuple[Tensor, Tensor] | None, heads: int, groups: int) -> bool:
    """Whether they are used, and can do it: BF16 on a CPU, heads of even size. What does not fit is left to torch.

    turn: cos and sin (t, m) in FP32, or None where queries and keys have been turned; m is then all features of a key.
    """
    if library.in_use() is None or any(x.device.type != "cpu" or x.dtype != torch.bfloat16 for x in (q, kv, rotary)):
        return False
    cos = None if turn is None else turn[0].shape
    s = _Sizes.of(q.shape, kv.shape, cos, heads, groups)
    return (
        q.shape == (*kv.shape[:2], heads * (s.plain + s.turned))
        and kv.shape[2] == groups * (s.plain + s.values)
        and rotary.shape in {(*q.shape[:2], s.turned), (*q.shape[:2], groups * s.turned)}
        and heads % groups == 0
        and s.length > 1
        and min(s.turned, s.values, s.plain + 1) > 0
        and s.plain % 2 == s.turned % 2 == s.values % 2 == 0
        and (turn is None or all(x.shape == (s.length, s.turned) and x.dtype == torch.float32 for x in turn))
    )


class CausalAttention(torch.autograd.Function):
    """q, kv, rotary keys, cos, sin, h, g, scale (positive) → (b, t, h · w). Query head i reads keys i // (h / g)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, rotary: Tensor, *others: Any) -> Tensor:
        cos, sin, heads, groups, scale = others
        ctx.save_for_backward(q, kv, rotary, cos, sin)
        ctx.others = heads, groups, scale
        out: Tensor = torch.ops.moe_train.attention_forward(q, kv, rotary, *others)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients: tuple[Tensor, Tensor, Tensor]
        gradients = torch.ops.moe_train.attention_backward(grad_outputs[0], *ctx.saved_tensors, *ctx.others)
        return (*gradients, None, None, None, None, None)


def of_heads(q_bhtc: Tensor, k_bgtc: Tensor, v_bgtc: Tensor, scale: float) -> Tensor | None:
    """The same of queries and keys that have been turned, by heads: (b, h, t, w). None where `takes` says no."""
    if library.in_use() is None:
        return None
    heads, groups = q_bhtc.shape[1], k_bgtc.shape[1]
    q, values, keys = (x.transpose(1, 2).flatten(2) for x in (q_bhtc, v_bgtc, k_bgtc))
    if not takes(q, values, keys, None, heads, groups):
        return None
    out: Tensor = CausalAttention.apply(q, values, keys, None, None, heads, groups, scale)
    by_heads: Tensor = out.unflatten(-1, (heads, -1)).transpose(1, 2)
    return by_heads


def _call(
    name: str,
    q: Tensor,
    kv: Tensor,
    rotary: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    groups: int,
    scale: float,
    /,
    **others: Tensor,
) -> None:
    """`others`: the result, or gradients."""
    s = _Sizes.of(q.shape, kv.shape, None if cos is None else cos.shape, heads, groups)
    if rotary.stride() != (s.length * rotary.stride(1), rotary.stride(1), 1):  # tokens one after another may have gaps
        rotary = rotary.contiguous()
    tensors = {"q": q.contiguous(), "kv": kv.contiguous(), "rotary": rotary, **others}
    if cos is not None and sin is not None:
        tensors |= {"cos": cos.contiguous(), "sin": sin.contiguous()}
    own = rotary.shape[2] == groups * s.turned
    if not own and "grad_q" in others:
        tensors["parts"] = q.new_empty(len(q) * groups * s.length * s.turned, dtype=torch.float32)
        tensors["done"] = torch.zeros(len(q), dtype=torch.int64)
    sizes = (len(q) * groups, groups, heads // groups, s.length, s.plain, s.turned, s.values, rotary.stride(1), own)
    arguments = _Arguments(*sizes, **{key: x.data_ptr() for key, x in tensors.items()}, scale=scale)
    library.call_on_cores(name, arguments)


@operator("moe_train::attention_forward")
def _forward(
    q: Tensor,
    kv: Tensor,
    rotary: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    groups: int,
    scale: float,
) -> Tensor:
    out: Tensor = _like_result(q, kv, rotary, cos, sin, heads, groups, scale)
    _call("attention_forward", q, kv, rotary, cos, sin, heads, groups, scale, out=out)
    return out


@_forward.register_fake
def _like_result(
    q: Tensor, kv: Tensor, rotary: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, groups: int, scale: float
) -> Tensor:
    s = _Sizes.of(q.shape, kv.shape, None if cos is None else cos.shape, heads, groups)
    return q.new_empty(*q.shape[:2], heads * s.values)


@operator("moe_train::attention_backward")
def _backward(
    grad_out: Tensor,
    q: Tensor,
    kv: Tensor,
    rotary: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    groups: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    made: tuple[Tensor, Tensor, Tensor] = _like_gradients(grad_out, q, kv, rotary, cos, sin, heads, groups, scale)
    gradients = dict(zip(("grad_q", "grad_kv", "grad_rotary"), made))
    inputs = (q, kv, rotary, cos, sin, heads, groups, scale)
    _call("attention_backward", *inputs, grad_out=grad_out.contiguous(), **gradients)
    return made


@_backward.register_fake
def _like_gradients(
    grad_out: Tensor, q: Tensor, kv: Tensor, rotary: Tensor, *_: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), kv.new_empty(kv.shape), rotary.new_empty(rotary.shape)  # whatever strides they have


@register_flop_formula([torch.ops.moe_train.attention_forward])
def _forward_flops(q: torch.Size, kv: torch.Size, rotary: torch.Size, *others: Any, **__: Any) -> int:
    """For torch's counter: all scores, as it counts torch's own attention."""
    return _products(q, kv, *others, of_keys=1, of_values=1)


@register_flop_formula([torch.ops.moe_train.attention_backward])
def _backward_flops(_: torch.Size, q: torch.Size, kv: torch.Size, rotary: torch.Size, *others: Any, **__: Any) -> int:
    return _products(q, kv, *others, of_keys=3, of_values=2)


def _products(
    q: torch.Size,
    kv: torch.Size,
    cos: torch.Size | None,
    _: torch.Size | None,
    heads: int,
    groups: int,
    *__: Any,
    of_keys: int,
    of_values: int,
) -> int:
    """FLOPs of so many products of all scores with the features of keys, and with those of values."""
    s = _Sizes.of(q, kv, cos, heads, groups)
    return 2 * q[0] * heads * s.length**2 * (of_keys * (s.plain + s.turned) + of_values * s.values)
