"""The router's product is FP32's to the bit where its gradients' products are of fewer bits."""

from __future__ import annotations

import pytest
import torch

from moe_train.model.router import ExactForward


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def test_choices_rest_on_fp32_and_gradients_on_ten_bits_or_more(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(shape, generator=generator).to(device) for shape in ((512, 96), (24, 96), (512, 24)))
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    before = torch.backends.cuda.matmul.fp32_precision
    logits = ExactForward.apply(*leaves)
    logits.backward(grad)
    assert torch.equal(logits, torch.nn.functional.linear(x, weight))
    for leaf, exact in zip(leaves, (grad.double() @ weight.double(), grad.double().t() @ x.double()), strict=True):
        assert leaf.grad is not None
        assert (leaf.grad.double() - exact).norm() <= 2**-11 * exact.norm()
    assert torch.backends.cuda.matmul.fp32_precision == before
