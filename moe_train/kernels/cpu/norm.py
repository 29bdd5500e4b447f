"""RMSNorm by norm.c, with what is added to the residual stream before it, and its gradients."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from moe_train.kernels.cpu import library
from moe_train.kernels.cut import is_cut
from moe_train.uncompiled import operator

_PARTS = 16  # of the rows: gradients of the weight are added up in the same order on any number of cores
_FEWEST_ROWS = 64
_SIZES = ("rows", "width", "parts")
_FORWARD = ("added", "weight", "total", "normed", "wide")
_BACKWARD = ("grad_normed", "grad_wide", "grad_total", "grad_x", "grad_added", "grad_weight")


class _Arguments(ctypes.Structure):
    """`Norm` in norm.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_void_p) for name in ("next", "x")),
        *((name, ctypes.c_int64) for name in ("stride", "narrow")),
        *((name, ctypes.c_void_p) for name in _FORWARD + _BACKWARD),
        ("eps", ctypes.c_float),
    ]


def takes(x: Tensor, weight: Tensor, added: Tensor | None = None) -> bool:
    """Whether it is used, and can do it: rows enough on a CPU, x in FP32 or BF16, what is added in BF16."""
    return (
        library.in_use() is not None
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and weight.dtype == torch.float32
        and not is_cut(weight)
        and x.shape[-1:] == weight.shape
        and x.numel() >= _FEWEST_ROWS * len(weight)
        and (added is None or (added.dtype == torch.bfloat16 and x.dtype == torch.float32 and added.shape == x.shape))
    )


class NormOfSum(torch.autograd.Function):
    """x (…, d), something to add to it or None, weight (d) → their sum, its norm in BF16, and in FP32 if `wide`.

    The sum is in FP32, or x itself where nothing is added. It alone is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor, eps: float, wide: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        total, normed, exact = norm_forward(x, added, weight, eps, wide)
        total = x if added is None else total
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.adds = eps, added is not None
        ctx.set_materialize_grads(False)
        return total, normed, exact if wide else None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        along, normed, exact = grads
        if normed is None and exact is None:
            narrow = along.bfloat16() if along is not None and ctx.adds else None
            return along, narrow, None, None, None
        along = None if along is None else along.float()
        grad_x, grad_added, grad_weight = norm_backward(total, weight, along, normed, exact, ctx.eps, ctx.adds)
        return grad_x, grad_added if ctx.adds else None, grad_weight, None, None


def again(total: Tensor, weight: Tensor, eps: float, wide: bool) -> tuple[Tensor, ...]:
    """The norms of a sum that there is already."""
    _, normed, exact = norm_forward(total, None, weight, eps, wide)
    return (normed, exact) if wide else (normed,)


def _call(name: str, x: Tensor, weight: Tensor, eps: float, **tensors: Tensor | None) -> None:
    d = len(weight)
    rows = x.reshape(-1, d)  # a view, for rows that are a part of longer ones
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    held = {key: None if each is None else each.contiguous() for key, each in tensors.items()}
    places = {key: each.data_ptr() for key, each in held.items() if each is not None}
    arguments = _Arguments(
        rows=len(rows),
        width=d,
        parts=_PARTS,
        x=rows.data_ptr(),
        stride=rows.stride(0),
        narrow=x.dtype == torch.bfloat16,
        weight=weight.data_ptr(),
        eps=eps,
        **places,
    )
    library.call_on_cores(name, arguments)


@operator("moe_train::norm_forward")
def norm_forward(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, wide: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x + added in FP32 (empty where nothing is added), its norm in BF16, and in FP32 (empty if not `wide`)."""
    total, normed, exact = _like_norms(x, added, weight, eps, wide)
    results = {"normed": normed, "wide": exact if wide else None, "total": None if added is None else total}
    _call("norm_forward", x, weight.contiguous(), eps, added=added, **results)
    return total, normed, exact


@norm_forward.register_fake
def _like_norms(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, wide: bool
) -> tuple[Tensor, Tensor, Tensor]:
    def like(there: bool, dtype: torch.dtype) -> Tensor:
        return x.new_empty(x.shape if there else (0,), dtype=dtype)

    return like(added is not None, torch.float32), like(True, torch.bfloat16), like(wide, torch.float32)


@operator("moe_train::norm_backward")
def norm_backward(
    total: Tensor,
    weight: Tensor,
    grad_total: Tensor | None,
    grad_normed: Tensor | None,
    grad_wide: Tensor | None,
    eps: float,
    adds: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, in its format, of what was added (BF16; empty if not `adds`) and of the weight."""
    grad_x, grad_added, grad_weight = _like_gradients(total, weight, grad_total, grad_normed, grad_wide, eps, adds)
    parts = weight.new_empty(_PARTS, len(weight))
    results = {"grad_x": grad_x, "grad_added": grad_added if adds else None, "grad_weight": parts}
    grads = {"grad_total": grad_total, "grad_normed": grad_normed, "grad_wide": grad_wide}
    _call("norm_backward", total, weight.contiguous(), eps, **grads, **results)
    torch.sum(parts, 0, out=grad_weight)
    return grad_x, grad_added, grad_weight


@norm_backward.register_fake
def _like_gradients(
    total: Tensor,
    weight: Tensor,
    grad_total: Tensor | None,
    grad_normed: Tensor | None,
    grad_wide: Tensor | None,
    eps: float,
    adds: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_added = total.new_empty(total.shape if adds else (0,), dtype=torch.bfloat16)
    return total.new_empty(total.shape), grad_added, weight.new_empty(weight.shape)
