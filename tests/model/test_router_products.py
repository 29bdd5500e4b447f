"""The router's products are of ten bits or more, and leave other products as they were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from operations import Operations
from torch._ops import OpOverload

from moe_train.config import MoEConfig
from moe_train.model.router import Router, TF32Linear

# A GPU may cut the other bits of both operands off instead of rounding: up to 2^-10 of each, half of it on average.
TEN_BITS = 2.0**-10


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def test_the_routers_products_are_of_ten_bits_or_more(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(shape, generator=generator).to(device) for shape in ((512, 96), (24, 96), (512, 24)))
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    before = torch.backends.cuda.matmul.fp32_precision
    formats: list[str] = []

    def see(operation: OpOverload, *_: object) -> None:
        if "mm" in operation.__name__:
            formats.append(torch.backends.cuda.matmul.fp32_precision)

    with Operations(see):
        logits = TF32Linear.apply(*leaves)
        logits.backward(grad)
    assert formats == ["tf32"] * 3
    wide = [tensor.double() for tensor in (x, weight, grad)]
    found = (logits, *(leaf.grad for leaf in leaves))
    for product, exact in zip(found, (wide[0] @ wide[1].t(), wide[2] @ wide[1], wide[2].t() @ wide[0]), strict=True):
        assert (product.double() - exact).norm() <= TEN_BITS * exact.norm()
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.gpu
def test_in_bf16_they_are_of_tf32_and_in_fp32_of_fp32(moe: Callable[..., MoEConfig]) -> None:
    router = Router(moe(), 64).cuda()
    torch.nn.init.normal_(router.weight)
    x = torch.randn(256, 64, device="cuda")
    exact = x.double() @ router.weight.double().t()
    errors = {}
    for dtype in (torch.bfloat16, torch.float32):
        with torch.autocast("cuda", dtype, enabled=dtype == torch.bfloat16):
            errors[dtype] = ((router.logits(x).double() - exact).norm() / exact.norm()).item()
    assert errors[torch.float32] < 2**-20 < 2**-14 < errors[torch.bfloat16] <= TEN_BITS
