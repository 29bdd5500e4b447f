"""The routed experts of a layer, from tokens to tokens, by experts.c.

Where torch's operations copy each token once for every expert it goes to, these read it where it is.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_train.kernels.cpu import library
from moe_train.kernels.cut import is_cut
from moe_train.uncompiled import operator

_SIZES = ("experts", "hidden", "width", "shared")
_FORWARD = ("x", "token", "first", "second", "weight", "ends", "order", "next", "gate_up", "y")
_FEWEST_ROWS = 64
_MOST_WEIGHTS = 2**20  # of a SwiGLU that all rows go through: each part has gradients of its own, 64 MiB in all
_BACKWARD = ("grad_y", "grad_x", "grad_first", "grad_second", "grad_weight")


class _Arguments(ctypes.Structure):
    """`Experts` in experts.c."""

    _fields_ = [(name, ctypes.c_int64) for name in _SIZES] + [(name, ctypes.c_void_p) for name in _FORWARD + _BACKWARD]


def takes(x_td: Tensor, gate_up_weight: Tensor, down_weight: Tensor) -> bool:
    """Whether they are used, and can do it: x in BF16 on a CPU, master weights in FP32, even sizes.

    Not while weights are cut over processes: FSDP2 gathers them where the module is called, and in BF16.
    """
    return (
        library.in_use() is not None
        and x_td.device.type == "cpu"
        and x_td.dtype == torch.bfloat16
        and not is_cut(gate_up_weight)
        and all(w.device == x_td.device and w.dtype == torch.float32 for w in (gate_up_weight, down_weight))
        and down_weight.shape[1] % 2 == down_weight.shape[2] % 2 == 0
        and x_td.shape[1] == down_weight.shape[1]
    )


class SwiGLUOfTokens(torch.autograd.Function):
    """x (t, d) in BF16, w₁ (e, 2f, d) and w₂ (e, d, f) in FP32 → (t, d): each token's gated experts, summed.

    Row i of those sorted by expert is token `token_n[i]`; its expert's rows end before `ends_e[e]`; it has the weight
    `weight_n1[i]`. `place_tk`: where a token's rows are among them; None: x is rows, each for itself, and so is the
    result. Gradients of the weights are not rounded to BF16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_td: Tensor,
        first: Tensor,
        second: Tensor,
        weight_n1: Tensor,
        ends_e: Tensor,
        token_n: Tensor,
        place_tk: Tensor | None,
    ) -> Tensor:
        y_nd, gate_up = torch.ops.moe_train.experts_forward(x_td, first, second, weight_n1, ends_e, token_n)
        ctx.save_for_backward(x_td, first, second, weight_n1, ends_e, token_n, place_tk, gate_up)
        return _summed(y_nd, place_tk)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x_td, first, second, weight_n1, ends_e, token_n, place_tk, gate_up = ctx.saved_tensors
        grad_nd, grad_first, grad_second, grad_weight = torch.ops.moe_train.experts_backward(
            grad_outputs[0].contiguous(), x_td, first, second, weight_n1, ends_e, token_n, gate_up
        )
        return _summed(grad_nd, place_tk), grad_first, grad_second, grad_weight, None, None, None


def takes_rows(x: Tensor, first: Tensor, second: Tensor) -> bool:
    """Whether a SwiGLU that all rows go through is done in parts like experts: with few enough weights."""
    few = first.numel() + second.numel() <= _MOST_WEIGHTS and len(x) >= _FEWEST_ROWS
    return few and takes(x, first.unsqueeze(0), second.unsqueeze(0))


class SwiGLUOfRows(torch.autograd.Function):
    """x (m, d) in BF16, w₁ (2f, d) and w₂ (d, f) in FP32 → (m, d). What is kept is x and (m, 2f), as in swiglu.py."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        y: Tensor
        y, gate_up = torch.ops.moe_train.experts_forward(x, first[None], second[None], *_in_parts(x))
        ctx.save_for_backward(x, first, second, gate_up)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, first, second, gate_up = ctx.saved_tensors
        grad_x, grad_first, grad_second, _ = torch.ops.moe_train.experts_backward(
            grad_outputs[0].contiguous(), x, first[None], second[None], *_in_parts(x), gate_up
        )
        return grad_x, grad_first[0], grad_second[0]


def _in_parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of rows, where parts end, and the rows themselves."""
    count = library.parts(len(x))
    ends = (torch.arange(1, count + 1) * len(x) // count).to(torch.int32)
    return x.new_ones(len(x), 1), ends, torch.arange(len(x))


def _summed(rows_nd: Tensor, place_tk: Tensor | None) -> Tensor:
    return rows_nd if place_tk is None else F.embedding_bag(place_tk, rows_nd, mode="sum")


def _call(name: str, first: Tensor, second: Tensor, ends_e: Tensor, **tensors: Tensor) -> None:
    """The kernel takes the fullest experts first, so that no core is left with one of them at the end."""
    order = ends_e.diff(prepend=ends_e.new_zeros(1)).argsort(descending=True, stable=True).to(torch.int32)
    tensors |= {"first": first.contiguous(), "second": second.contiguous()}
    tensors |= {"ends": ends_e, "order": order}
    sizes = (len(ends_e), first.shape[2], second.shape[2], len(first) < len(ends_e))
    arguments = _Arguments(*sizes, **{k: t.data_ptr() for k, t in tensors.items()})
    library.call_on_cores(name, arguments)


@operator("moe_train::experts_forward")
def _forward(
    x_td: Tensor, first: Tensor, second: Tensor, weight_n1: Tensor, ends_e: Tensor, token_n: Tensor
) -> tuple[Tensor, Tensor]:
    """Results (n, d) by row, and what SwiGLU reads (n, 2f). One weight for several runs of rows is shared by all."""
    y_nd, gate_up = _like_results(x_td, first, second, weight_n1, ends_e, token_n)
    x_td, weight_n1 = x_td.contiguous(), weight_n1.contiguous()
    _call("experts_forward", first, second, ends_e, x=x_td, token=token_n, weight=weight_n1, gate_up=gate_up, y=y_nd)
    return y_nd, gate_up


@_forward.register_fake
def _like_results(
    x_td: Tensor, first: Tensor, second: Tensor, weight_n1: Tensor, ends_e: Tensor, token_n: Tensor
) -> tuple[Tensor, Tensor]:
    return x_td.new_empty(len(token_n), x_td.shape[1]), x_td.new_empty(len(token_n), first.shape[1])


@operator("moe_train::experts_backward")
def _backward(
    grad_td: Tensor,
    x_td: Tensor,
    first: Tensor,
    second: Tensor,
    weight_n1: Tensor,
    ends_e: Tensor,
    token_n: Tensor,
    gate_up: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x by row (n, d), of both weights and of the rows' weights."""
    made: tuple[Tensor, Tensor, Tensor, Tensor]
    made = _like_gradients(grad_td, x_td, first, second, weight_n1, ends_e, token_n, gate_up)
    x_td, weight_n1 = x_td.contiguous(), weight_n1.contiguous()
    tensors = dict(zip(("grad_x", "grad_first", "grad_second", "grad_weight"), made))
    shared = len(first) < len(ends_e)
    if shared:
        tensors |= {
            f"grad_{name}": w.new_empty(len(ends_e), *w.shape[1:]) for name, w in (("first", first), ("second", second))
        }
    tensors |= {"x": x_td, "token": token_n, "weight": weight_n1, "gate_up": gate_up, "grad_y": grad_td}
    _call("experts_backward", first, second, ends_e, **tensors)
    if shared:
        torch.sum(tensors["grad_first"], 0, keepdim=True, out=made[1])
        torch.sum(tensors["grad_second"], 0, keepdim=True, out=made[2])
    return made


@_backward.register_fake
def _like_gradients(
    grad_td: Tensor,
    x_td: Tensor,
    first: Tensor,
    second: Tensor,
    weight_n1: Tensor,
    ends_e: Tensor,
    token_n: Tensor,
    gate_up: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows_nd = x_td.new_empty(len(token_n), x_td.shape[1])
    return rows_nd, first.new_empty(first.shape), second.new_empty(second.shape), weight_n1.new_empty(weight_n1.shape)


@register_flop_formula([torch.ops.moe_train.experts_forward])
def _forward_flops(x: torch.Size, first: torch.Size, *others: Any, **_: Any) -> int:
    """For torch's counter, which does not look into operators: three products of d × f for a row."""
    rows: int = others[3][0]
    return 2 * rows * first[1] * first[2] * 3 // 2


@register_flop_formula([torch.ops.moe_train.experts_backward])
def _backward_flops(grad: torch.Size, x: torch.Size, first: torch.Size, *others: Any, **_: Any) -> int:
    rows: int = others[3][0]
    return 2 * (2 * rows * first[1] * first[2] * 3 // 2)
