"""RMSNorm against torch's own in float64, forward and backward, and what it keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_train.model.norm import RMSNorm

EPS = 1e-6


def norm_of(weight: Tensor, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(len(weight), EPS).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(weight)
    return norm


def gradients(y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, inputs, torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y))


@settings(deadline=None, max_examples=30)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    features=st.integers(1, 70),
    magnitude=st.sampled_from([1e-12, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_are_those_of_float64(
    shape: list[int], features: int, magnitude: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(*shape, features, generator=generator) * magnitude).requires_grad_()
    weight = torch.randn(features, generator=generator)
    norm = norm_of(weight, torch.float32)
    y = norm(x)
    wide, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = F.rms_norm(wide, (features,), wide_weight, EPS)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    # An input's gradient is the difference of two terms as large as this.
    terms = 2 * float((weight.abs().max() * wide.detach().square().mean(-1).add(EPS).rsqrt()).max())
    for mine, theirs, size in zip(
        gradients(y, x, norm.weight), gradients(expected, wide, wide_weight), (terms, 2 * len(wide) ** 2), strict=True
    ):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5 * size)


def test_gradients_by_finite_differences() -> None:
    norm = norm_of(torch.randn(6), torch.float64)
    assert torch.autograd.gradcheck(norm, torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True))


def test_a_row_of_zeros_has_a_finite_gradient() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    norm_of(torch.ones(8), torch.float32)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_its_input_is_kept_as_it_came_and_the_result_is_in_fp32(dtype: torch.dtype) -> None:
    norm, x = norm_of(torch.ones(64), torch.float32), torch.randn(32, 64, dtype=dtype, requires_grad=True)
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = norm(x)
    large = [t for t in kept if t.numel() == x.numel()]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]
    assert y.dtype == torch.float32
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
