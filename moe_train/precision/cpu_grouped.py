"""Grouped matmul on a CPU, a product a group; in BF16 made of products whose shapes repeat.

oneDNN compiles a kernel for every new shape of a BF16 product and keeps the last thousand. The rows an expert gets
change at every step, so torch's grouped matmul spends its time compiling: 0.71 ms for a new shape against 0.13 ms for a
known one (1,000 × 128 × 128, two AVX-512 cores). Here every group is cut at a multiple of `ROWS`, which leaves a few
dozen shapes in all. In FP32 no group is cut, and it is as fast as torch's; in FP64, which torch's lacks, it serves
gradient checks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 64


def grouped_product(x_nk: Tensor, weight_eok: Tensor, ends_e: Tensor) -> Tensor:
    """Rows of group e times weight[e] transposed → (n, o)."""
    out = x_nk.new_empty(len(x_nk), weight_eok.shape[1])
    for expert, start, end in _pieces(ends_e, x_nk.dtype):
        torch.mm(x_nk[start:end], weight_eok[expert].t(), out=out[start:end])
    return out


def grouped_weight_product(left_no: Tensor, right_ni: Tensor, ends_e: Tensor) -> Tensor:
    """left transposed times right, for each group → (e, o, i); groups without rows have zeros.

    In BF16 a group is copied with rows of zeros after it, which takes less than a second product for what is left.
    """
    out = left_no.new_empty(len(ends_e), left_no.shape[1], right_ni.shape[1])
    start = 0
    for expert, end in enumerate(ends_e.tolist()):
        left, right = left_no[start:end], right_ni[start:end]
        if left.dtype.itemsize < 4 and (missing := -len(left) % ROWS):
            left, right = F.pad(left, (0, 0, 0, missing)), F.pad(right, (0, 0, 0, missing))
        torch.mm(left.t(), right, out=out[expert])
        start = end
    return out


def _pieces(ends_e: Tensor, dtype: torch.dtype) -> list[tuple[int, int, int]]:
    """(expert, start, end) of the row ranges to multiply; in BF16 whole multiples of ROWS, then what is left."""
    pieces = []
    start = 0
    for expert, end in enumerate(ends_e.tolist()):
        cut = start + (end - start) // ROWS * ROWS if dtype.itemsize < 4 else end
        pieces += [(expert, s, e) for s, e in ((start, cut), (cut, end)) if e > s]
        start = end
    return pieces
