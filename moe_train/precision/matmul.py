"""The seam: every matrix product of the model is one of the functions here.

`linear` multiplies all rows by one weight, `grouped_linear` multiplies runs of rows by one weight each (experts),
`swiglu_linear` is both products of a SwiGLU with the activation between. A layer that a recipe gives FP8 products hands
them over. Without them all take their number format from autocast, so FP32 master weights are read in BF16 where BF16
training is on; torch's own grouped matmul ignores autocast on the CPU, which is why the casts stand here and not in the
layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.kernels.cpu import experts
from moe_train.kernels.cpu import linear as compiled
from moe_train.precision import gpu_linear, grouped
from moe_train.precision.formats import compute_dtype
from moe_train.precision.fp8 import Fp8Layer
from moe_train.precision.fp8_linear import fp8_linear
from moe_train.precision.fp8_swiglu import fp8_swiglu
from moe_train.precision.swiglu import SwiGLUProducts


def linear(x: Tensor, weight: Tensor, fp8: Fp8Layer | None = None) -> Tensor:
    """x (…, in) times weight (out, in) → (…, out) in the compute format."""
    if fp8 is None:
        dtype = compute_dtype(x)
        if dtype is torch.bfloat16 and compiled.takes(x, weight):
            out: Tensor = compiled.LinearOfRows.apply(x.flatten(0, -2).bfloat16(), weight)  # type: ignore[no-untyped-call]
            return out.view(*x.shape[:-1], -1)
        if gpu_linear.takes(x, dtype, weight):
            return linears(x, weight)[0]
        return F.linear(x, weight)
    return fp8_linear(x.flatten(0, -2), weight, None, fp8).view(*x.shape[:-1], -1)


def linears(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """`linear` of one x and several weights: on a GPU one product, of which each result is a part."""
    dtype = compute_dtype(x)
    if not gpu_linear.takes(x, dtype, *weights):
        return tuple(linear(x, weight) for weight in weights)
    found: tuple[Tensor, ...] = gpu_linear.LinearsOfRows.apply(x.flatten(0, -2).to(dtype), *weights)  # type: ignore[no-untyped-call]
    return tuple(out.unflatten(0, x.shape[:-1]) for out in found)


def grouped_linear(x_ni: Tensor, weight_eoi: Tensor, ends_e: Tensor, fp8: Fp8Layer | None = None) -> Tensor:
    """Rows of group e, which end before `ends_e[e]` (int32, on the device of x), times weight_eoi[e] → (n, out).

    No host synchronisation on a GPU; groups may be empty. With compute capability 9.x and 10.x, where torch's own form
    is taken, `in` and `out` must fill 16 bytes (multiples of 8 in BF16, of 4 in FP32).
    """
    if fp8 is not None:
        return fp8_linear(x_ni, weight_eoi, ends_e, fp8)
    dtype = compute_dtype(x_ni)
    out: Tensor = _Grouped.apply(x_ni.to(dtype), weight_eoi.to(dtype), ends_e)  # type: ignore[no-untyped-call]
    return out


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ni: Tensor, weight_eoi: Tensor, ends_e: Tensor) -> Tensor:
        ctx.save_for_backward(x_ni, weight_eoi, ends_e)
        return grouped.product(x_ni, weight_eoi, ends_e)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_ni, weight_eoi, ends_e = ctx.saved_tensors
        grad_no = grad_outputs[0].contiguous()
        needs_x, needs_weight, _ = ctx.needs_input_grad
        return (
            grouped.input_gradient(grad_no, weight_eoi, ends_e) if needs_x else None,
            grouped.weight_gradient(grad_no, x_ni, ends_e) if needs_weight else None,
            None,
        )


def swiglu_linear(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    *,
    row_weight: Tensor | None = None,
    ends_e: Tensor | None = None,
    fp8: tuple[Fp8Layer, Fp8Layer] | None = None,
) -> Tensor:
    """down(silu(gate x) · up x · row_weight): x (…, d) → (…, d) in the compute format, with one weight each.

    With `ends_e` x is (n, d) in groups and the weights are stacked, as in `grouped_linear`. `row_weight` (n, 1).
    """
    if fp8 is not None:
        return fp8_swiglu(x, gate_up_weight, down_weight, row_weight, ends_e, fp8)
    dtype = compute_dtype(x)
    alone = row_weight is None and ends_e is None
    if alone and dtype is torch.bfloat16 and compiled.takes(x, gate_up_weight, down_weight):
        rows = x.flatten(0, -2).bfloat16()
        in_parts = experts.takes_rows(rows, gate_up_weight, down_weight)
        function = experts.SwiGLUOfRows if in_parts else compiled.SwiGLUOfRows
        y: Tensor = function.apply(rows, gate_up_weight, down_weight)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], -1)
    x_nd = x.flatten(0, -2).to(dtype)
    if ends_e is not None and row_weight is not None and experts.takes(x_nd, gate_up_weight, down_weight):
        weights, token_n = (gate_up_weight, down_weight), torch.arange(len(x_nd))
        y_nd: Tensor = experts.SwiGLUOfTokens.apply(x_nd, *weights, row_weight.to(dtype), ends_e, token_n, None)  # type: ignore[no-untyped-call]
        return y_nd
    out: Tensor = SwiGLUProducts.apply(  # type: ignore[no-untyped-call]
        x_nd,
        gate_up_weight,
        down_weight,
        None if row_weight is None else row_weight.to(dtype),
        ends_e,
    )
    return out.view(*x.shape[:-1], down_weight.shape[-2])
