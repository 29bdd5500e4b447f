"""The seam: every matrix product of the model is one of the two functions here.

`linear` multiplies all rows by one weight, `grouped_linear` multiplies runs of rows by one weight each (experts). A
layer that a recipe gives FP8 products hands them over. Without them both take their number format from autocast, so
FP32 master weights are read in BF16 where BF16 training is on; torch's own grouped matmul ignores autocast on the CPU,
which is why the cast stands here and not in the layers.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from moe_train.precision.cpu_grouped import CpuGroupedLinear
from moe_train.precision.formats import compute_dtype
from moe_train.precision.fp8 import Fp8Layer


def linear(x: Tensor, weight: Tensor, fp8: Fp8Layer | None = None) -> Tensor:
    """x (…, in) times weight (out, in) → (…, out) in the compute format."""
    return F.linear(x, weight) if fp8 is None else fp8.linear(x, weight)


def grouped_linear(x_ni: Tensor, weight_eoi: Tensor, ends_e: Tensor, fp8: Fp8Layer | None = None) -> Tensor:
    """Rows of group e, which end before `ends_e[e]` (int32, on the device of x), times weight_eoi[e] → (n, out).

    No host synchronisation where the device has a grouped matmul (compute capability 9.x and 10.x); groups may be
    empty. On a GPU the sizes `in` and `out` must fill 16 bytes (multiples of 8 in BF16, of 4 in FP32).
    """
    if fp8 is not None:
        return fp8.grouped_linear(x_ni, weight_eoi, ends_e)
    dtype = compute_dtype(x_ni)
    x_ni, weight_eoi = x_ni.to(dtype), weight_eoi.to(dtype)
    product: Tensor
    if x_ni.device.type == "cpu":
        product = CpuGroupedLinear.apply(x_ni, weight_eoi, ends_e)  # type: ignore[no-untyped-call]
    else:
        product = F.grouped_mm(x_ni, weight_eoi.transpose(1, 2), offs=ends_e)
    return product
