"""Grouped products in Triton within the error of FP32 sums, for every format, any strides and ragged groups."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moe_train.kernels import grouped_matmul

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def held(found: Tensor, left: Tensor, right: Tensor) -> None:
    """found = left · right within k · 2⁻²⁴ of the sum of magnitudes, summed in any order, and the result's rounding.

    Tensor cores cut off rather than round, and keep a little less: four times as much.
    """
    left, right = left.double(), right.double()
    error = (found.double() - left @ right).abs()
    unit = 2.0**-24 if found.device.type == "cpu" else 2.0**-22
    relative = (left.shape[-1] + 4) * unit + torch.finfo(found.dtype).eps
    assert (error <= left.abs() @ right.abs() * relative + 1e-6 * (found.dtype == torch.float16)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "o"), [(75, 140), (64, 32)])
def test_products_of_ragged_groups(
    dtype: torch.dtype, k: int, o: int, ragged: tuple[int, Tensor], random: Callable[..., Tensor]
) -> None:
    n, ends_e = ragged
    if n > 1000:
        k, o = 8 * k, 8 * o
    x, w, dy = random(n, k, dtype=dtype), random(len(ends_e), o, k, dtype=dtype), random(n, o, dtype=dtype)
    x[int(ends_e[-1]) :] = torch.nan  # rows of no group
    y = grouped_matmul.grouped_product(x, w, ends_e)
    dx = grouped_matmul.grouped_product(dy, w.mT, ends_e)
    dw = grouped_matmul.grouped_weight_product(dy, x, ends_e)
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, torch.float32)
    start = 0
    for group, end in enumerate(ends_e.tolist()):
        held(y[start:end], x[start:end], w[group].mT)
        held(dx[start:end], dy[start:end], w[group])
        held(dw[group], dy[start:end].mT, x[start:end])
        start = end
    assert (y[start:] == 0).all()
    assert (dx[start:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_rows_read_where_they_are_give_the_bits_of_copied_ones(
    dtype: torch.dtype, index: torch.dtype, ragged: tuple[int, Tensor], random: Callable[..., Tensor]
) -> None:
    n, ends_e = ragged
    k, o = (75, 140) if n < 1000 else (600, 1120)
    source = torch.randint(n // 3, (2 * n,), generator=torch.Generator().manual_seed(3)).to(ends_e.device, index)[::2]
    x, w = random(k, n // 3, dtype=dtype).t(), random(len(ends_e), o, k, dtype=dtype)
    dy, few = random(n, o, dtype=dtype), random(n // 3, o, dtype=dtype)
    rows = x[source.long()]
    assert torch.equal(
        grouped_matmul.grouped_product(x, w, ends_e, source), grouped_matmul.grouped_product(rows, w, ends_e)
    )
    product = grouped_matmul.grouped_weight_product
    assert torch.equal(product(dy, x, ends_e, right_source_n=source), product(dy, rows, ends_e))
    assert torch.equal(product(x, dy, ends_e, left_source_n=source), product(rows, dy, ends_e))
    both = product(x, few, ends_e, dtype, left_source_n=source, right_source_n=source)
    assert torch.equal(both, product(rows, few[source.long()], ends_e, dtype))


def test_operands_that_do_not_fit_are_said(random: Callable[..., Tensor]) -> None:
    x, w = random(4, 8), random(1, 3, 8)
    ends_e = torch.tensor([4], dtype=torch.int32, device=x.device)
    with pytest.raises(ValueError, match="both FP32"):
        grouped_matmul.grouped_product(x, w.half(), ends_e)
    with pytest.raises(ValueError, match="inner dimensions are 7 and 8"):
        grouped_matmul.grouped_product(x[:, 1:], w, ends_e)
    with pytest.raises(ValueError, match="ends_e"):
        grouped_matmul.grouped_weight_product(x, x, ends_e.long())
    with pytest.raises(ValueError, match="source: one int64 or int32"):
        grouped_matmul.grouped_product(x, w, ends_e, ends_e.short())
    with pytest.raises(ValueError, match="4 and 1 rows"):
        grouped_matmul.grouped_weight_product(x, x, ends_e, right_source_n=ends_e - 1)
