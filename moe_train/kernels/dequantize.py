"""FP8 rows with their scales back to the compute format, every number read once and written once.

As torch's operations (kernels/reference.py) this took six visits, three of them in FP32: 24 of the 291 ms of a step of
`base` in FP8 on an H200, for what a SwiGLU had kept of its input (docs/log.md, 2026-11-27).

    n rows, k inner
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_train.kernels.device import decode, narrow
from moe_train.kernels.layouts import PIECE, Rows

_ROWS = 32  # with 128 columns and 4 warps a thread has 32 numbers


@triton.jit
def _dequantize_kernel(values, scales, out, n, k, E4M3: tl.constexpr, M: tl.constexpr):
    blocks = tl.cdiv(k, 128)
    block = tl.program_id(0) % blocks
    row = tl.program_id(0) // blocks * M + tl.arange(0, M)
    column = block * 128 + tl.arange(0, 128)
    inside = (row < n)[:, None] & (column < k)[None, :]
    place = row.to(tl.int64)[:, None] * k + column[None, :]
    half = decode(tl.load(values + place, mask=inside, other=0), E4M3)
    scale = tl.load(scales + row.to(tl.int64) * blocks + block, mask=row < n, other=0.0)
    x = half.to(tl.float32) * scale[:, None]
    tl.store(out + place, narrow(x, out.dtype.element_ty), mask=inside)


def dequantize(rows: Rows, dtype: torch.dtype) -> Tensor:
    """(n, k), rounded to `dtype` once."""
    values = rows.values.contiguous()
    (n, k), e4m3 = values.shape, values.dtype == torch.float8_e4m3fn
    out = torch.empty_like(values, dtype=dtype)
    if out.numel():
        grid = (triton.cdiv(n, _ROWS) * triton.cdiv(k, PIECE),)
        arguments = (values.view(torch.uint8), rows.scales.contiguous(), out, n, k)
        _dequantize_kernel[grid](*arguments, E4M3=e4m3, M=_ROWS, num_warps=4)
    return out
