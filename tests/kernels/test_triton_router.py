"""The router's products in three of TF32 against FP64. Interpreted they are FP32: only a GPU shows their error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from kernel_checks import error
from test_triton_routing import MOE

from moe_train.kernels import router as of_gpu
from moe_train.model import router


def through(function: Callable[..., Tensor], x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """Logits, and the gradients of x and the weight."""
    leaves = [each.detach().requires_grad_() for each in (x, weight)]
    logits = function(*leaves)
    return [logits.detach(), *torch.autograd.grad(logits, leaves, grad.to(logits.dtype))]


@pytest.mark.parametrize(("t", "d", "e"), [(150, 70, 24), (40, 130, 5), (1, 3, 200), (0, 8, 4)])
def test_products_have_the_error_of_fp32(t: int, d: int, e: int, random: Callable[..., Tensor]) -> None:
    if random(1).device.type == "cuda":
        t, d = 400 * t, 8 * d
    x, weight, grad = random(t, d + 3)[:, :d], random(e, d) * d**-0.5, random(t, e)
    found = through(of_gpu.RouterLinear.apply, x, weight, grad)
    exact = through(F.linear, x.double(), weight.double(), grad)
    for each, torchs, right in zip(found, through(F.linear, x, weight, grad), exact, strict=True):
        assert each.dtype == torch.float32
        assert each.shape == right.shape
        assert error(each, right) <= 4 * error(torchs, right) + 2e-7
    turned = through(of_gpu.RouterLinear.apply, x, weight, grad.t().contiguous().t())
    for each, other in zip(turned, found, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_no_number_is_further_off_than_four_times_fp32s_and_choices_stay(random: Callable[..., Tensor]) -> None:
    if random(1).device.type != "cuda":
        pytest.skip("interpreted products are FP32")
    x, weight, grad = 3 * random(65_536, 1024), random(96, 1024) / 32, random(65_536, 96)
    found, torchs = (through(function, x, weight, grad) for function in (of_gpu.RouterLinear.apply, F.linear))
    exact = through(F.linear, x.double(), weight.double(), grad)
    for each, other, right in zip(found, torchs, exact, strict=True):
        assert error(each, right) <= 4 * error(other, right)
        assert (each.double() - right).abs().max() <= 4 * (other.double() - right).abs().max()
    chosen, others = (logits.topk(6).indices.sort().values for logits in (found[0], exact[0]))
    assert (chosen == others).all(-1).float().mean() > 0.9995


def test_numbers_that_are_none_stay_in_their_rows(random: Callable[..., Tensor]) -> None:
    x, weight = random(20, 40), random(6, 40)
    x[3, 5] = torch.nan
    logits = of_gpu.RouterLinear.apply(x, weight)
    assert logits[3].isnan().all()
    assert torch.cat((logits[:3], logits[4:])).isfinite().all()


def test_what_does_not_fit_is_said(random: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="FP32 matrices"):
        of_gpu.RouterLinear.apply(random(4, 8), random(3, 7))
    with pytest.raises(ValueError, match="FP32 matrices"):
        of_gpu.RouterLinear.apply(random(4, 8).double(), random(3, 8))


def test_the_routers_logits_are_the_same_with_it_and_without(
    random: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, grad = random(50, 32), random(50, MOE.num_experts)
    layer = router.Router(MOE, 32).to(x.device)
    torch.nn.init.normal_(layer.weight)

    def logits(x_td: Tensor) -> list[Tensor]:
        leaf = x_td.clone().requires_grad_()
        with torch.autocast(x.device.type, torch.bfloat16):
            found: Tensor = layer.logits(leaf)
        return [found.detach(), *torch.autograd.grad(found, (leaf, layer.weight), grad)]

    without = logits(x)
    called: list[Tensor] = []

    def takes(x_td: Tensor, _: Tensor) -> bool:
        called.append(x_td)
        return True

    monkeypatch.setattr(router, "runs_triton", lambda _: True)
    monkeypatch.setattr(of_gpu, "takes", takes)
    for each, other in zip(logits(x), without, strict=True):
        assert each.dtype == other.dtype == torch.float32
        torch.testing.assert_close(each, other, rtol=1e-5, atol=1e-5)
    assert called
