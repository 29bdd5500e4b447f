"""The router's three products in FP32 on tensor cores: each number as two of TF32, and three products of these.

    a b ≈ a₁ b₁ + (a₁ b₂ + a₂ b₁),   a₁ = TF32(a),   a₂ = a - a₁, of which the tensor cores read what TF32 holds

TF32 keeps 11 bits of FP32's 24, so a₁ and what is read of a₂ are a but for its last bit at most, and a₂ b₂, which is
left out, is 2⁻²² of a b at most. Tensor cores cut off what their sums do not hold, so those are of 32 terms, and FP32
units add them up with rounding: with that arXiv 2203.03341 finds the error of FP32 products. Choices see no more of it
than of another order of sums. The weight's gradient is summed over a fixed number of parts of the rows, and then over
the parts. Not measured on a GPU.

    t rows, d inner, e experts
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_train.kernels.capability import check

_PARTS = 32  # of the rows, for the weight's gradient
_FEWEST_ROWS = 1024
_FAST = (9, 0)  # the compute capability it is shaped for; on 8.0 registers spill, elsewhere nobody looked


@triton.jit
def _product_kernel(
    a_ptr, b_ptr, out, m, n, k, part, a_stride_m, a_stride_k, b_stride_k, b_stride_n,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A block of a (m, k) by b (k, n), of the inner indices of a part: `part` of them, a multiple of K."""
    across = tl.cdiv(n, N)
    row = (tl.program_id(0) // across) * M + tl.arange(0, M)
    column = (tl.program_id(0) % across) * N + tl.arange(0, N)
    first = tl.program_id(1) * part
    end = tl.minimum(first + part, k)
    inner = first + tl.arange(0, K)
    a_at = a_ptr + row.to(tl.int64)[:, None] * a_stride_m + inner.to(tl.int64)[None, :] * a_stride_k
    b_at = b_ptr + inner.to(tl.int64)[:, None] * b_stride_k + column.to(tl.int64)[None, :] * b_stride_n
    total = tl.zeros((M, N), tl.float32)
    for start in range(first, end, K):
        inside = start + tl.arange(0, K) < end
        a = tl.load(a_at, mask=(row < m)[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_at, mask=inside[:, None] & (column < n)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="tf32x3")
        a_at += K * a_stride_k
        b_at += K * b_stride_k
    at = out + (tl.program_id(1).to(tl.int64) * m + row)[:, None] * n + column[None, :]
    tl.store(at, total, mask=(row < m)[:, None] & (column < n)[None, :])


def _product(a_mk: Tensor, b_kn: Tensor, parts: int = 1) -> Tensor:
    (m, k), n = a_mk.shape, b_kn.shape[1]
    check(a_mk.dtype == b_kn.dtype == torch.float32 and len(b_kn) == k, "a product of FP32 matrices that fit")
    columns, inner = min(128, max(16, triton.next_power_of_2(n))), 32
    part = triton.cdiv(triton.cdiv(k, parts), inner) * inner
    out = torch.empty(parts, m, n, dtype=torch.float32, device=a_mk.device)
    if out.numel():
        # Of 64 rows and four warps two programs fit a core: one splits numbers while the other multiplies.
        grid = (triton.cdiv(m, 64) * triton.cdiv(n, columns), parts)
        arguments = (a_mk, b_kn, out, m, n, k, part, *a_mk.stride(), *b_kn.stride())
        _product_kernel[grid](*arguments, M=64, N=columns, K=inner, num_warps=4, num_stages=3)
    return out[0] if parts == 1 else out.sum(0)


def takes(x_td: Tensor, weight_ed: Tensor) -> bool:
    """Whether it can do it and should: FP32, rows enough, on a GPU it is shaped for.

    Not while the weight is cut over processes.
    """
    return (
        x_td.dtype == weight_ed.dtype == torch.float32
        and len(x_td) >= _FEWEST_ROWS
        and not isinstance(weight_ed, DTensor)
        and torch.cuda.get_device_capability(x_td.device) == _FAST
    )


class RouterLinear(torch.autograd.Function):
    """x (t, d) by weight (e, d) → (t, e), all FP32. Raises ValueError."""

    @staticmethod
    def forward(ctx: Any, x_td: Tensor, weight_ed: Tensor) -> Tensor:
        ctx.save_for_backward(x_td, weight_ed)
        return _product(x_td, weight_ed.t())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_td, weight_ed = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        return (
            _product(grad_outputs[0], weight_ed) if needs_x else None,
            _product(grad_outputs[0].t(), x_td, _PARTS) if needs_weight else None,
        )
