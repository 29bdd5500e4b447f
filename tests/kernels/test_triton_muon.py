"""Muon's elementwise halves in one visit each, within FP32's rounding of the formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moe_train.kernels import muon
from moe_train.training import muon as steps


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_momentum_and_direction(nesterov: bool, dtype: torch.dtype, random: Callable[..., Tensor]) -> None:
    gradient, momentum = random(5, 700), random(5, 700)
    out = torch.full((5, 700), torch.nan, dtype=dtype, device=gradient.device)
    expected = torch.lerp(momentum.double(), gradient.double(), 0.05)
    way = torch.lerp(gradient.double(), expected, 0.95) if nesterov else expected
    muon.direction(gradient, momentum, 0.95, nesterov, out)
    torch.testing.assert_close(momentum.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.double(), way, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_gradients_are_multiplied_as_they_are_read(random: Callable[..., Tensor]) -> None:
    gradient, momentum, coefficient = random(7, 300), random(7, 300), random(1).abs()
    found = []
    for given, factor in ((coefficient * gradient, None), (gradient, coefficient), (gradient, None)):
        own, out = momentum.clone(), torch.empty_like(gradient)
        muon.direction(given, own, 0.95, True, out, factor)
        found.append(torch.stack([own, out]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update(dtype: torch.dtype, random: Callable[..., Tensor]) -> None:
    parameter, moved = random(3, 1111), random(3, 1111, dtype=dtype)
    rate = torch.tensor(0.02, device=parameter.device)
    expected = parameter.double() * (1 - 0.02 * 0.1) - 0.02 * 3.2 * moved.double()
    muon.update(parameter, moved, rate, 0.1, 3.2)
    torch.testing.assert_close(parameter.double(), expected, rtol=1e-6, atol=1e-6)


def test_operands_that_do_not_fit_are_said(random: Callable[..., Tensor]) -> None:
    x = random(4, 6)
    with pytest.raises(ValueError, match="contiguous, of one size"):
        muon.direction(x, x.clone(), 0.9, True, x.t())
    with pytest.raises(ValueError, match="coefficient: one FP32 number"):
        muon.direction(x, x.clone(), 0.9, True, x.clone(), random(2))
    with pytest.raises(ValueError, match="one rate"):
        muon.update(x, x, random(2), 0.1, 1.0)


def test_muons_step_by_kernels_is_its_step(random: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    values, gradients = [random(6, 8), random(3, 4, 8)], [random(6, 8), random(3, 4, 8)]
    found = []
    for kernels in (False, True):
        monkeypatch.setattr(steps, "kernels_take", lambda _, kernels=kernels: kernels)
        parameters = [torch.nn.Parameter(value.clone()) for value in values]
        optimizer = steps.Muon(
            parameters, lr=0.02, momentum=0.9, nesterov=True, ns_steps=5, weight_decay=0.1, joined=[parameters[0]]
        )
        monkeypatch.setattr(optimizer, "_step_compiled", lambda *_: False)
        for _ in range(3):
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient.clone()
            optimizer.step()
        found.append([parameter.detach() for parameter in parameters])
    for one, other, value in zip(*found, values):
        # The iteration is in BF16 where that is fast: a direction's last bit moves an update of about 0.02 by 1/256.
        torch.testing.assert_close(one, other, rtol=0, atol=4e-4)
        assert not torch.equal(one, value)
