"""Products of FP8 operands with the accumulation of Hopper's tensor cores, or with FP32's.

Hopper adds FP8 products with about 14 bits: within one instruction the terms are aligned to the largest and cut off
below. DeepSeek-V3 (arXiv 2412.19437, section 3.3.2) therefore moves the sum to FP32 registers after 128 products. Here
an instruction is 32 products (K of wgmma for 8-bit operands): their sum is exact in FP32, the running sum is cut to 14
bits after each, and goes to FP32 after 128. It is a model of what was described, not a measurement of the silicon.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

BITS, INSTRUCTION, PROMOTION = 14, 32, 128

Accumulation = Literal["float32", "hopper"]


def product(left_rk: Tensor, right_ck: Tensor, accumulation: Accumulation, promotion: int = PROMOTION) -> Tensor:
    """left (…, r, k) times right (…, c, k) transposed → (…, r, c), all FP32.

    `promotion`: products after which the narrow sum is added to an FP32 one; a multiple of 32.
    """
    if accumulation == "float32":
        return left_rk @ right_ck.mT
    total = left_rk.new_zeros(*left_rk.shape[:-1], right_ck.shape[-2])
    inner = left_rk.shape[-1]
    for start in range(0, inner, promotion):
        narrow = torch.zeros_like(total)
        for first in range(start, min(start + promotion, inner), INSTRUCTION):
            part = slice(first, min(first + INSTRUCTION, start + promotion, inner))
            narrow = cut(narrow + left_rk[..., part] @ right_ck[..., part].mT)
        total += narrow
    return total


def cut(x: Tensor, bits: int = BITS) -> Tensor:
    """Towards zero, to `bits` significant bits."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.trunc(mantissa * 2.0**bits) / 2.0**bits, exponent)
