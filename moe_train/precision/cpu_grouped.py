"""Grouped matmul on a CPU, made of products whose shapes repeat.

oneDNN compiles a kernel for every new shape of a BF16 product and keeps the last thousand. The rows an expert gets
change at every step, so torch's grouped matmul spends its time compiling: 0.71 ms for a new shape against 0.13 ms for a
known one (1,000 × 128 × 128, two AVX-512 cores). Here every group is cut at a multiple of `ROWS`, which leaves a few
dozen shapes in all. In FP32 it is as fast as torch's; in FP64, which torch's lacks, it serves gradient checks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS = 64


def _pieces(ends_e: Tensor) -> list[tuple[int, int, int]]:
    """(expert, start, end) of the row ranges to multiply: per group whole multiples of ROWS, then what is left."""
    pieces = []
    start = 0
    for expert, end in enumerate(ends_e.tolist()):
        cut = start + (end - start) // ROWS * ROWS
        pieces += [(expert, s, e) for s, e in ((start, cut), (cut, end)) if e > s]
        start = end
    return pieces


class CpuGroupedLinear(torch.autograd.Function):
    """x (n, in), weight (e, out, in), ends (e) → (n, out); rows of group e times weight[e] transposed."""

    @staticmethod
    def forward(ctx: Any, x_ni: Tensor, weight_eoi: Tensor, ends_e: Tensor) -> Tensor:
        pieces = _pieces(ends_e)
        out = x_ni.new_empty(len(x_ni), weight_eoi.shape[1])
        for expert, start, end in pieces:
            torch.mm(x_ni[start:end], weight_eoi[expert].t(), out=out[start:end])
        ctx.save_for_backward(x_ni, weight_eoi)
        ctx.pieces = pieces
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_ni, weight_eoi = ctx.saved_tensors
        grad_no = grad_outputs[0].contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x_ni)
            for expert, start, end in ctx.pieces:
                torch.mm(grad_no[start:end], weight_eoi[expert], out=grad_x[start:end])
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight_eoi)  # groups without rows have a gradient of zero
            for expert, start, end in ctx.pieces:
                grad_weight[expert].addmm_(grad_no[start:end].t(), x_ni[start:end])
        return grad_x, grad_weight, None
