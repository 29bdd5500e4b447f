"""Muon against the singular value decomposition, against itself matrix by matrix, and against torch's 2-D Muon."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.training import muon
from moe_train.training.muon import Muon, orthogonalized

# Of the quintic after five steps: 0.682 to 1.202 in exact arithmetic for singular values of 0.002 of the norm or more;
# bfloat16 adds a percent.
BAND = (0.67, 1.22)
SETTINGS = {"lr": 0.02, "momentum": 0.95, "nesterov": True, "ns_steps": 5, "weight_decay": 0.1}


def parameters(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def train(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 4),
    st.integers(1, 24),
    st.floats(2, 4),
    st.booleans(),
    st.integers(0, 2**31),
    st.floats(-6, 6).map(lambda exponent: 10**exponent),
)
def test_singular_values_end_in_the_band_and_singular_vectors_stay(dtype, count, small, aspect, tall, seed, scale):
    shape = (count, small, round(small * aspect))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    x = (x.mT if tall else x).to(dtype)
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    result = orthogonalized(x, 5).double()
    inner = u.mT @ result @ vh.mT  # diagonal if the vectors are kept
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert result.shape == x.shape
    assert BAND[0] < values.min() <= values.max() < BAND[1]
    assert (inner - torch.diag_embed(values)).abs().max() < (1e-4 if dtype == torch.float32 else 0.1)


def test_a_zero_gradient_gives_a_zero_update():
    assert torch.equal(orthogonalized(torch.zeros(2, 3, 5), 5), torch.zeros(2, 3, 5))


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (48, 48)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_two_dimensional_steps_are_those_of_torch(shape, nesterov):
    (ours,), (theirs,) = parameters(shape), parameters(shape)
    settings = {**SETTINGS, "nesterov": nesterov}
    start = ours.detach().clone()
    train(Muon([ours], **settings), [ours], steps=5)
    train(torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings), [theirs], steps=5)
    # torch always iterates in bfloat16; where we take float32 the two differ by its rounding.
    assert (ours - theirs).norm() < 0.03 * (theirs - start).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_and_layers_go_together_as_they_would_alone(dtype, monkeypatch):
    monkeypatch.setattr(muon, "fast_dtype", lambda device: dtype)
    together = parameters((4, 16, 24), (16, 24), (24, 16), (2, 16, 24))
    train(Muon(together, **SETTINGS), together, steps=3)
    alone = parameters((4, 16, 24), (16, 24), (24, 16), (2, 16, 24))
    matrices = [torch.nn.Parameter(m.clone()) for p in alone for m in p.detach().reshape(-1, *p.shape[-2:])]
    optimizers = [Muon([matrix], **SETTINGS) for matrix in matrices]
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        gradients = [torch.randn(p.shape, generator=generator) for p in alone]
        flat = [m for g in gradients for m in g.reshape(-1, *g.shape[-2:])]
        for matrix, gradient, optimizer in zip(matrices, flat, optimizers):
            matrix.grad = gradient
            optimizer.step()
    expected = torch.cat([matrix.flatten() for matrix in matrices])
    got = torch.cat([parameter.flatten() for parameter in together])
    # Batched and single products may sum in another order.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("shape", [(24, 16), (3, 24, 16)], ids=str)
def test_joined_matrices_move_as_they_would_alone(shape):
    together = parameters(shape)
    apart = [torch.nn.Parameter(half.detach().clone()) for half in together[0].chunk(2, dim=-2)]
    joined, separate = Muon(together, **SETTINGS, joined=together), Muon(apart, **SETTINGS)
    for step in range(3):
        together[0].grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        for parameter, half in zip(apart, together[0].grad.chunk(2, dim=-2)):
            parameter.grad = half.clone()
        joined.step()
        separate.step()
    torch.testing.assert_close(together[0].detach(), torch.cat(apart, dim=-2).detach(), rtol=1e-5, atol=1e-6)


def test_a_bounded_batch_changes_nothing(monkeypatch):
    whole, parts = parameters(*[(8, 16)] * 5), parameters(*[(8, 16)] * 5)
    train(Muon(whole, **SETTINGS), whole, steps=2)
    monkeypatch.setitem(muon.MUON_BATCH_ELEMENTS, "cpu", 2 * 8 * 16)
    train(Muon(parts, **SETTINGS), parts, steps=2)
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)


def test_the_update_has_the_root_mean_square_of_adamw_whatever_the_shape():
    for shape in [(64, 64), (32, 128), (3, 128, 32)]:
        (parameter,) = parameters(shape)
        before = parameter.detach().clone()
        train(Muon([parameter], **{**SETTINGS, "weight_decay": 0.0}), [parameter], steps=1)
        rms = (parameter - before).square().mean().sqrt() / SETTINGS["lr"]
        assert 0.15 < rms < 0.22  # 0.2 times the typical singular value of the band


def test_weight_decay_shrinks_by_the_rate_and_not_by_the_scaled_update():
    (parameter,) = parameters((16, 32))
    before = parameter.detach().clone()
    parameter.grad = torch.zeros_like(parameter)
    Muon([parameter], **SETTINGS).step()
    torch.testing.assert_close(parameter.detach(), before * (1 - 0.02 * 0.1))


def test_a_parameter_without_a_gradient_is_left_alone():
    with_gradient, without = parameters((4, 8), (4, 8))
    before = without.detach().clone()
    optimizer = Muon([with_gradient, without], **SETTINGS)
    train(optimizer, [with_gradient], steps=1)
    assert torch.equal(without, before)
    assert without not in optimizer.state


def test_a_saved_state_loads_as_plain_tensors_and_continues_bit_for_bit():
    straight = parameters((3, 8, 16), (16, 8))
    optimizer = Muon(straight, **SETTINGS)
    train(optimizer, straight, steps=2)
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)

    resumed = [torch.nn.Parameter(p.detach().clone()) for p in straight]
    second = Muon(resumed, **SETTINGS)
    second.load_state_dict(torch.load(saved, weights_only=True))
    train(optimizer, straight, steps=2, seed=7)
    train(second, resumed, steps=2, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed))


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"not a \(8,\)"):
        Muon(parameters((8,)), **SETTINGS)
