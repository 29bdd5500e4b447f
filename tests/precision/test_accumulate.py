"""Sums of products as Hopper makes them: 14 bits wide, promoted to FP32 after 128."""

from __future__ import annotations

import pytest
import torch

from moe_train.precision.accumulate import BITS, cut, product


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def test_cutting_keeps_so_many_bits_and_goes_towards_zero() -> None:
    x = torch.tensor([1.0 + 2.0**-13, 1.0 + 2.0**-14, -(1.0 + 2.0**-14), 0.0, 3.0e38, 2.0**-130])
    assert cut(x).tolist() == [1.0 + 2.0**-13, 1.0, -1.0, 0.0, float(cut(torch.tensor(3.0e38))), 2.0**-130]
    values = torch.randn(10_000)
    assert float(((values - cut(values)) / values).abs().max()) < 2.0 ** (1 - BITS)
    assert bool((cut(values).abs() <= values.abs()).all())


def test_fp32_accumulation_is_the_plain_product() -> None:
    left, right = torch.randn(5, 300), torch.randn(7, 300)
    assert torch.equal(product(left, right, "float32"), left @ right.T)


def test_at_4096_the_narrow_sum_is_off_and_promotion_puts_it_right() -> None:
    # arXiv 2412.19437, section 3.3.2: a relative error near 2% at K = 4096, of random matrices, without promotion.
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.rand(64, 4096, generator=generator) for _ in range(2))
    exact = left.double() @ right.double().T
    errors = {
        "float32": relative_error(product(left, right, "float32"), exact),
        "promoted": relative_error(product(left, right, "hopper"), exact),
        "never": relative_error(product(left, right, "hopper", promotion=4096), exact),
    }
    assert errors["float32"] < 1e-6
    assert errors["promoted"] < 3e-4
    assert 10 * errors["promoted"] < errors["never"] < 0.02


@pytest.mark.parametrize("inner", [1, 31, 32, 127, 129, 300])
def test_any_inner_size_is_summed_whole(inner: int) -> None:
    left, right = torch.randn(2, 3, inner), torch.randn(2, 4, inner)
    exact = left.double() @ right.double().mT
    assert product(left, right, "hopper").double().sub(exact).abs().max() < 1e-3 * exact.abs().max() + 1e-3
