"""RMSNorm of a sum on a GPU, by kernels/norm.py: what autograd and torch.compile see of it.

The sum is kept, or the input itself where nothing is added, and a number a row.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moe_train.kernels.cut import is_cut
from moe_train.precision.support import runs_triton
from moe_train.uncompiled import operator

_WIDEST = 8192  # a row is within one program; kernels/norm.py, which is not there without Triton, has it too
_FORMATS = (torch.float32, torch.bfloat16, torch.float16)


def takes(x: Tensor, weight: Tensor, added: Tensor | None = None) -> bool:
    """Whether it can do it: on a GPU with Triton, the weight in FP32, as is the stream that something is added to."""
    return (
        runs_triton(x.device)
        and x.dtype in _FORMATS
        and weight.dtype == torch.float32
        and not is_cut(weight)
        and x.shape[-1:] == weight.shape
        and 0 < len(weight) <= _WIDEST
        and (added is None or (x.dtype == torch.float32 and added.dtype in _FORMATS and added.shape == x.shape))
    )


class NormOfSum(torch.autograd.Function):
    """x (…, d), something to add to it or None, weight (d) → their sum, its norm twice, and 1 / rms of its rows.

    The sum is in FP32, or x itself where nothing is added. The norm is in the format `narrow`, if that is not None, and
    in FP32 if `exact`; else None. 1 / rms is what `again` asks for.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor, eps: float, narrow: torch.dtype | None, exact: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        total, rounded, wide, scale = rms_norm(x, added, weight, eps, narrow, exact)
        total = x if added is None else total
        ctx.save_for_backward(total, weight, scale)
        ctx.added = None if added is None else added.dtype
        ctx.mark_non_differentiable(scale)
        ctx.set_materialize_grads(False)
        return total, None if narrow is None else rounded, wide if exact else None, scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, scale = ctx.saved_tensors
        along, grad_narrow, grad_exact, _ = grads
        if grad_narrow is None and grad_exact is None:
            same = None if along is None or ctx.added is None else along.to(ctx.added)
            return along, same, None, None, None, None
        other = None if ctx.added == total.dtype else ctx.added  # else one gradient serves both
        grad_x, grad_added, grad_weight = rms_norm_backward(total, weight, scale, along, grad_narrow, grad_exact, other)
        if other is None:
            grad_added = grad_x
        return grad_x, None if ctx.added is None else grad_added, grad_weight, None, None, None


def _kernel() -> ModuleType:
    from moe_train.kernels import norm  # not at the top: Triton is not everywhere

    return norm


def _like(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Room for as many numbers in this format, or for none."""
    return x.new_empty(0) if dtype is None else x.new_empty(x.shape, dtype=dtype)


@operator("moe_train::rms_norm")
def rms_norm(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, narrow: torch.dtype | None, exact: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x + added in FP32, its norm in the format `narrow` and in FP32, 1 / rms; empty where there is none to make."""
    total, rounded, wide, scale = _like_norms(x, added, weight, eps, narrow, exact)
    results = {"total": None if added is None else total, "exact": wide if exact else None}
    _kernel().norm_rows(x, added, weight, scale, eps=eps, narrow=None if narrow is None else rounded, **results)
    return total, rounded, wide, scale


@rms_norm.register_fake
def _like_norms(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, narrow: torch.dtype | None, exact: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float32
    total, exact_norm = _like(x, None if added is None else wide), _like(x, wide if exact else None)
    return total, _like(x, narrow), exact_norm, x.new_empty(x.shape[:-1], dtype=wide)


def again(
    total: Tensor, scale: Tensor, weight: Tensor, narrow: torch.dtype | None, exact: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Both norms of a sum that there is already, with the same bits."""
    rounded = None if narrow is None else _like(total, narrow)
    wide = _like(total, torch.float32) if exact else None
    _kernel().norm_rows(total, None, weight, scale, eps=None, total=None, narrow=rounded, exact=wide)
    return rounded, wide


@operator("moe_train::rms_norm_backward")
def rms_norm_backward(
    total: Tensor,
    weight: Tensor,
    scale: Tensor,
    along: Tensor | None,
    grad_narrow: Tensor | None,
    grad_exact: Tensor | None,
    added: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x in the format of the sum, of what was added in `added` (empty if None), and of the weight."""
    grad_x, grad_added, _ = _like_gradients(total, weight, scale, along, grad_narrow, grad_exact, added)
    grads = {"along": along, "grad_narrow": grad_narrow, "grad_exact": grad_exact, "grad_x": grad_x}
    also = None if added is None else grad_added
    grad_weight: Tensor = _kernel().norm_rows_backward(total, weight, scale, **grads, grad_added=also)
    return grad_x, grad_added, grad_weight


@rms_norm_backward.register_fake
def _like_gradients(
    total: Tensor,
    weight: Tensor,
    scale: Tensor,
    along: Tensor | None,
    grad_narrow: Tensor | None,
    grad_exact: Tensor | None,
    added: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(total, total.dtype), _like(total, added), weight.new_empty(weight.shape)
