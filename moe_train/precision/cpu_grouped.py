"""Grouped matmul on a CPU, a product a group; in BF16 made of products whose shapes repeat.

oneDNN compiles a kernel for every new shape of a BF16 product and keeps the last thousand. The rows an expert gets
change at every step, so torch's grouped matmul spends its time compiling: 0.71 ms for a new shape against 0.13 ms for a
known one (1,000 × 128 × 128, two AVX-512 cores). Here a product's rows are rounded up, which leaves
a few dozen shapes in all. In FP32 they are the group's, and it is as fast as torch's; in FP64, which torch's lacks, it
serves gradient checks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_product(x_nk: Tensor, weight_eok: Tensor, ends_e: Tensor) -> Tensor:
    """Rows of group e times weight[e] transposed → (n, o).

    In BF16 a product runs over into rows of the groups after its own, which then write theirs over it.
    """
    out = x_nk.new_empty(len(x_nk), weight_eok.shape[1])
    for expert, start, end in _groups(ends_e):
        if end > start:
            stop = min(start + _rounded_up(end - start, x_nk), len(x_nk))
            torch.mm(x_nk[start:stop], weight_eok[expert].t(), out=out[start:stop])
    return out


def grouped_weight_product(left_no: Tensor, right_ni: Tensor, ends_e: Tensor) -> Tensor:
    """left transposed times right, for each group → (e, o, i); groups without rows have zeros.

    In BF16 a group is copied with rows of zeros after it, which takes less than a second product for what is left.
    """
    out = left_no.new_empty(len(ends_e), left_no.shape[1], right_ni.shape[1])
    for expert, start, end in _groups(ends_e):
        left, right = left_no[start:end], right_ni[start:end]
        if missing := _rounded_up(end - start, left) - (end - start):
            left, right = F.pad(left, (0, 0, 0, missing)), F.pad(right, (0, 0, 0, missing))
        torch.mm(left.t(), right, out=out[expert])
    return out


def _groups(ends_e: Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, start, end) of each."""
    ends = ends_e.tolist()
    return zip(range(len(ends)), [0, *ends], ends)


def _rounded_up(rows: int, of: Tensor) -> int:
    """In BF16 a multiple of 32, of more where there are many: 16 to 32 shapes for twice the rows. Else as they are."""
    multiple = max(32, 1 << max(rows.bit_length() - 5, 0)) if of.dtype.itemsize < 4 else 1
    return -(-rows // multiple) * multiple
