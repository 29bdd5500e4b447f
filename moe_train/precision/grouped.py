"""The three products of a linear layer in one format, for all rows at once or for groups of rows with a weight each.

Without `ends_e` there is one group and its weight is (o, i); else weights are (e, o, i). Groups are multiplied by
torch's grouped matmul in BF16 on GPUs of compute capability 9.x and 10.x, but on 9.0 by kernels/grouped_hopper.py
where it takes them, which is faster (0.43 and 0.69 ms where torch's takes 0.51 and 0.83), and where sums are short by
kernels/grouped_matmul.py (of 96 numbers, 32,768 rows: 10.2 µs, torch's 14.5). Elsewhere torch's copies the
groups' ends to the host and goes round them, and the project's kernels read them on the device; on a CPU `cpu_grouped`
does it. What may not be torch's is an operator of torch's library, which torch.compile takes as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_train.precision import cpu_grouped
from moe_train.precision.support import runs_hopper_products, takes_torchs_grouped_matmul
from moe_train.uncompiled import operator

_SHORT = 128  # sums of so many numbers


def product(x_ni: Tensor, weight: Tensor, ends_e: Tensor | None) -> Tensor:
    """(n, i) → (n, o): rows times their weight transposed."""
    if ends_e is None:
        return x_ni @ weight.mT
    if takes_torchs_grouped_matmul(x_ni) and not runs_hopper_products(x_ni.device):
        return F.grouped_mm(x_ni, weight.mT, offs=ends_e)
    out: Tensor = _product(x_ni, weight, ends_e)
    return out


def input_gradient(grad_no: Tensor, weight: Tensor, ends_e: Tensor | None) -> Tensor:
    """(n, o) → (n, i)."""
    if ends_e is None:
        return grad_no @ weight
    if takes_torchs_grouped_matmul(grad_no) and not runs_hopper_products(grad_no.device):
        return F.grouped_mm(grad_no, weight, offs=ends_e)
    out: Tensor = _product(grad_no, weight.mT, ends_e)
    return out


def widens_as_it_multiplies(device: torch.device) -> bool:
    """Whether a product of narrow operands can be had in FP32, in which it is summed: on NVIDIA's GPUs."""
    return device.type == "cuda" and torch.version.hip is None


def widened_product(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right, out_dtype=torch.float32)


def weight_gradient(grad_no: Tensor, x_ni: Tensor, ends_e: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """(n, o), (n, i) → (o, i) or (e, o, i); zeros for a group without rows.

    In `dtype`, or that of the operands, in which it is rounded first where it cannot be had otherwise.
    """
    dtype = grad_no.dtype if dtype is None else dtype
    if ends_e is None:
        if dtype == torch.float32 and grad_no.dtype != dtype and widens_as_it_multiplies(grad_no.device):
            return widened_product(grad_no.mT, x_ni)
        return (x_ni.mT @ grad_no).mT.to(dtype)  # as torch's own backward pass has it, to the bit
    if takes_torchs_grouped_matmul(grad_no):
        return F.grouped_mm(grad_no.mT, x_ni, offs=ends_e).to(dtype)
    out: Tensor = _weight_gradient(grad_no, x_ni, ends_e)
    return out.to(dtype)


def within_operator(x_nk: Tensor, weight_eok: Tensor, ends_e: Tensor) -> Tensor:
    """`product`, or with `weight.mT` `input_gradient`, for code that is an operator itself: without one around it."""
    if x_nk.device.type != "cuda":
        return cpu_grouped.grouped_product(x_nk, weight_eok, ends_e)
    if takes_torchs_grouped_matmul(x_nk) and not _ours_is_faster(x_nk, weight_eok):
        return F.grouped_mm(x_nk, weight_eok.mT, offs=ends_e)
    from moe_train.kernels import grouped_matmul

    return grouped_matmul.grouped_product(x_nk, weight_eok, ends_e)


def _ours_is_faster(x_nk: Tensor, weight_eok: Tensor) -> bool:
    """On 9.0, where that was measured."""
    if not runs_hopper_products(x_nk.device):
        return False
    from moe_train.kernels import grouped_hopper

    return x_nk.shape[1] <= _SHORT or grouped_hopper.takes_product(x_nk, weight_eok)


@operator("moe_train::grouped_product")
def _product(x_nk: Tensor, weight_eok: Tensor, ends_e: Tensor) -> Tensor:
    return within_operator(x_nk, weight_eok, ends_e)


@_product.register_fake
def _(x_nk: Tensor, weight_eok: Tensor, ends_e: Tensor) -> Tensor:
    return x_nk.new_empty(len(x_nk), weight_eok.shape[1])


@operator("moe_train::grouped_weight_gradient")
def _weight_gradient(grad_no: Tensor, x_ni: Tensor, ends_e: Tensor) -> Tensor:
    if x_ni.device.type == "cuda":
        from moe_train.kernels import grouped_matmul

        return grouped_matmul.grouped_weight_product(grad_no, x_ni, ends_e, grad_no.dtype)
    return cpu_grouped.grouped_weight_product(grad_no, x_ni, ends_e)


@_weight_gradient.register_fake
def _(grad_no: Tensor, x_ni: Tensor, ends_e: Tensor) -> Tensor:
    return grad_no.new_empty(len(ends_e), grad_no.shape[1], x_ni.shape[1])


@register_flop_formula([torch.ops.moe_train.grouped_product])
def _product_flops(x: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    """For torch's counter, which does not look into operators."""
    (rows, inner), outputs = x, weight[1]
    return 2 * rows * inner * outputs


@register_flop_formula([torch.ops.moe_train.grouped_weight_gradient])
def _weight_gradient_flops(grad: torch.Size, x: torch.Size, *_: object, **__: object) -> int:
    (rows, outputs), inputs = grad, x[1]
    return 2 * rows * outputs * inputs
