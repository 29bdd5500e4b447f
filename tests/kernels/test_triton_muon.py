"""Muon's elementwise halves in one visit each, within FP32's rounding of the formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moe_train.kernels import muon, newton_schulz
from moe_train.training import muon as steps

# Sizes of matrices that are stepped together: of more than a program, of less, of one number, off every boundary.
SIZES = [(1, 20_000), (1, 37), (1, 1), (1, 8192), (5, 700)]


def three_of_each(random: Callable[..., Tensor], sizes: list[tuple[int, int]] = SIZES) -> list[list[Tensor]]:
    """Parameters, gradients and momenta."""
    return [[random(*size) for size in sizes] for _ in range(3)]


def together(tensors: list[Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]).to(dtype)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [SIZES, [(4, 4096), (2, 8)]], ids=["odd", "aligned"])
def test_momenta_and_directions(
    nesterov: bool, dtype: torch.dtype, sizes: list[tuple[int, int]], random: Callable[..., Tensor]
) -> None:
    parameters, gradients, momenta = three_of_each(random, sizes)
    expected = torch.lerp(together(momenta), together(gradients), 0.05)
    way = torch.lerp(together(gradients), expected, 0.95) if nesterov else expected
    out = torch.full_like(way, torch.nan, dtype=dtype)
    before = [parameter.clone() for parameter in parameters]
    muon.Matrices.of(parameters, gradients, momenta).direct(out, 0.95, nesterov)
    torch.testing.assert_close(together(momenta), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.double(), way, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert all(torch.equal(*pair) for pair in zip(parameters, before))


def test_gradients_are_multiplied_as_they_are_read(random: Callable[..., Tensor]) -> None:
    parameters, gradients, momenta = three_of_each(random)
    coefficient = random(1).abs()
    found = []
    for given, factor in (([coefficient * g for g in gradients], None), (gradients, coefficient), (gradients, None)):
        own, out = [momentum.clone() for momentum in momenta], together(momenta, torch.float32)
        muon.Matrices.of(parameters, given, own).direct(out, 0.95, True, factor)
        found.append(torch.stack([together(own), out.double()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [SIZES, [(4, 4096), (2, 8)]], ids=["odd", "aligned"])
def test_update(dtype: torch.dtype, sizes: list[tuple[int, int]], random: Callable[..., Tensor]) -> None:
    parameters, gradients, momenta = three_of_each(random, sizes)
    moved = together(gradients, dtype)
    rate = torch.tensor(0.02, device=moved.device)
    expected = together(parameters) * (1 - 0.02 * 0.1) - 0.02 * 3.2 * moved.double()
    muon.Matrices.of(parameters, gradients, momenta).update(moved, rate, 0.1, 3.2)
    torch.testing.assert_close(together(parameters), expected, rtol=1e-6, atol=1e-6)


def test_operands_that_do_not_fit_are_said(random: Callable[..., Tensor]) -> None:
    x = random(4, 6)
    with pytest.raises(ValueError, match="contiguous, of one size"):
        muon.Matrices.of([x], [x.t()], [x.clone()])
    with pytest.raises(ValueError, match="FP32"):
        muon.Matrices.of([x], [x.bfloat16()], [x.clone()])
    matrices = muon.Matrices.of([x], [x.clone()], [x.clone()])
    with pytest.raises(ValueError, match="contiguous, of all"):
        matrices.direct(random(23), 0.9, True)
    with pytest.raises(ValueError, match="coefficient: one FP32 number"):
        matrices.direct(x.clone(), 0.9, True, random(2))
    with pytest.raises(ValueError, match="rate: one FP32 number"):
        matrices.update(x.clone(), random(2), 0.1, 1.0)


@pytest.mark.parametrize("shape", [(3, 96, 128), (2, 128, 96), (1, 128, 128), (4, 20, 7), (2, 1, 5), (0, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_matrices_stay_on_a_core(
    shape: tuple[int, int, int], dtype: torch.dtype, random: Callable[..., Tensor]
) -> None:
    """As near to FP32 as the products of torch, which round at the same places."""
    matrices = (random(*shape) * 3e-3).to(dtype)
    exact = steps.orthogonalized(matrices.float().cpu(), 5).double()
    plain = steps.orthogonalized(matrices.cpu(), 5).double()
    assert newton_schulz.takes(matrices)
    newton_schulz.orthogonalize_(matrices, 5, (3.4445, -4.7750, 2.0315), 1e-7)
    assert (matrices.double().cpu() - exact).norm() <= 1.1 * (plain - exact).norm() + 1e-3 * exact.norm()


def test_a_matrix_of_zeros_stays_so_and_others_are_left_alone(random: Callable[..., Tensor]) -> None:
    matrices = torch.stack([random(16, 24).bfloat16(), torch.zeros(16, 24, device=random(1).device).bfloat16()])
    alone = matrices[:1].clone()
    for stack in (matrices, alone):
        newton_schulz.orthogonalize_(stack, 5, (3.4445, -4.7750, 2.0315), 1e-7)
    assert torch.equal(matrices[0], alone[0])
    assert (matrices[1] == 0).all()
    for other in (random(2, 129, 8).bfloat16(), random(2, 8, 8), random(2, 8, 16).bfloat16()[..., ::2]):
        assert not newton_schulz.takes(other)
        with pytest.raises(ValueError, match="of 1 to 128 rows"):
            newton_schulz.orthogonalize_(other, 5, (3.4445, -4.7750, 2.0315), 1e-7)


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
