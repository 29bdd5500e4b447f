"""Grouped matmul on a CPU, a product a group; in BF16 made of products whose shapes repeat, some on each core.

oneDNN compiles a kernel for every new shape of a BF16 product and keeps the last thousand. The rows an expert gets
change at every step, so torch's grouped matmul spends its time compiling: 0.71 ms for a new shape against 0.13 ms for a
known one (1,000 × 128 × 128, two AVX-512 cores). Here a product's rows are rounded up, which leaves a few dozen shapes
in all. In FP32 they are the group's, and it is as fast as torch's; in FP64, which torch's lacks, it serves gradient
checks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.precision.cpu_threads import on_cores

_ENOUGH = 10**8  # multiplications and additions from which threads pay; waking them takes some 50 µs

Group = tuple[int, int, int]  # expert, where its rows start and end


def grouped_product(x_nk: Tensor, weight_eok: Tensor, ends_e: Tensor) -> Tensor:
    """Rows of group e times weight[e] transposed → (n, o)."""
    out = x_nk.new_empty(len(x_nk), weight_eok.shape[1])

    def multiply(groups: list[Group]) -> None:
        """In BF16 a product runs over into rows of these groups that come after its own and then write over it."""
        for expert, start, end in groups:
            x, weight = x_nk[start:end], weight_eok[expert].t()
            stop = end + _missing(x)
            if stop <= groups[-1][2]:
                torch.mm(x_nk[start:stop], weight, out=out[start:stop])
            else:
                out[start:end] = torch.mm(F.pad(x, (0, 0, 0, stop - end)), weight)[: end - start]

    _all_of(multiply, ends_e, x_nk, out)
    return out


def grouped_weight_product(left_no: Tensor, right_ni: Tensor, ends_e: Tensor) -> Tensor:
    """left transposed times right, for each group → (e, o, i); groups without rows have zeros.

    In BF16 a group is copied with rows of zeros after it, which takes less than a second product for what is left.
    """
    out = left_no.new_empty(len(ends_e), left_no.shape[1], right_ni.shape[1])

    def multiply(groups: list[Group]) -> None:
        for expert, start, end in groups:
            left, right = left_no[start:end], right_ni[start:end]
            if missing := _missing(left):
                left, right = F.pad(left, (0, 0, 0, missing)), F.pad(right, (0, 0, 0, missing))
            torch.mm(left.t(), right, out=out[expert])

    _all_of(multiply, ends_e, left_no, right_ni)
    return out


def _all_of(multiply: Callable[[list[Group]], None], ends_e: Tensor, first: Tensor, second: Tensor) -> None:
    """`multiply` for all groups in their order: in BF16 some of them on each core."""
    ends = ends_e.tolist()
    groups = list(zip(range(len(ends)), [0, *ends], ends))
    cores = torch.get_num_threads()
    work = 2 * ends[-1] * first.shape[1] * second.shape[1]
    if cores == 1 or not _narrow(first) or work < _ENOUGH:
        multiply(groups)
    else:
        on_cores(multiply, _shares(groups, cores))


def _shares(groups: list[Group], count: int) -> list[list[Group]]:
    """Runs of groups with about as many rows each."""
    shares: list[list[Group]] = [[] for _ in range(count)]
    rows = max(groups[-1][2], 1)
    for group in groups:
        shares[min((group[1] + group[2]) * count // (2 * rows), count - 1)].append(group)
    return [share for share in shares if share]


def _missing(rows: Tensor) -> int:
    """Rows up to a multiple of 32, of more where there are many: 16 to 32 shapes for twice the rows. In BF16 only."""
    count = len(rows)
    return -count % max(32, 1 << max(count.bit_length() - 5, 0)) if _narrow(rows) else 0


def _narrow(x: Tensor) -> bool:
    return x.dtype.itemsize < 4
