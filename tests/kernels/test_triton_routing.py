"""Choosing and sorting in Triton: what torch does, to the bit; gates, loss of balance and gradients against FP64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernel_checks import allowed, error
from small_model import MOE

from moe_train.kernels import routing
from moe_train.kernels.routing import Gating
from moe_train.model import dispatch, router
from moe_train.model.balancing import sequence_balance_loss


def weighed(gate: Tensor) -> Tensor:
    """The squares of gates that sum to one hardly change."""
    return gate * torch.arange(1, gate.shape[1] + 1, device=gate.device)


def in_fp64(
    logits: Tensor, bias: Tensor, real: Tensor, gating: Gating, parts: tuple[bool, bool] = (True, True)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Experts, their gates, the loss, and the gradient of the squares of those that `parts` names, summed."""
    leaf = logits.double().requires_grad_()
    score = leaf.sigmoid()
    expert = (score.detach() + bias).sort(dim=-1, descending=True, stable=True).indices[:, : gating.k]
    chosen = score.gather(-1, expert)
    gate = gating.scaled * (chosen / chosen.sum(-1, keepdim=True) if gating.normalised else chosen)
    loss = sequence_balance_loss(router.sequence_shares(score, real), expert, real, gating.loss_weight)
    squares = weighed(gate).square().sum() * float(parts[0]) + loss.square() * float(parts[1])
    return expert, gate.detach(), loss.detach(), torch.autograd.grad(squares, leaf)[0]


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(("b", "length", "e", "k"), [(2, 70, 96, 6), (3, 5, 24, 1), (1, 3, 300, 8), (2, 9, 3, 3)])
def test_choices_gates_the_loss_and_their_gradients_are_those_of_fp64(
    b: int, length: int, e: int, k: int, normalised: bool, random: Callable[..., Tensor]
) -> None:
    if random(1).device.type == "cuda":
        b, length = 16 * b, 40 * length
    wide, bias = random(b * length, e + 5), 0.1 * random(e)
    real, gating = random(b, length) > -1, Gating(k, normalised, scaled=2.5, loss_weight=0.3)
    expert, gate, loss, grad = in_fp64(wide[:, :e], bias, real, gating)
    leaf = wide.requires_grad_()
    found_expert, found_gate, found_loss = routing.Choosing.apply(leaf[:, :e], bias, real, gating)
    assert found_expert.dtype == torch.int64
    agree = (found_expert == expert).all(-1)
    on_cpu = wide.device.type == "cpu"
    assert agree.all() if on_cpu else agree.float().mean() > 0.999  # of near scores either is best
    torch.testing.assert_close(found_gate.double()[agree], gate[agree], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found_loss.double(), loss, rtol=1e-5 if on_cpu else 1e-4, atol=0)
    (found_grad,) = torch.autograd.grad(weighed(found_gate).square().sum() + found_loss.square(), leaf)
    torch.testing.assert_close(found_grad[agree, :e].double(), grad[agree], rtol=1e-4, atol=1e-6 * length)
    assert not found_grad[:, e:].any()
    again = routing.choose_experts(leaf[:, :e], bias, real, gating)
    assert all(torch.equal(*pair) for pair in zip(again[:3], (found_expert, found_gate, found_loss), strict=True))


@pytest.mark.parametrize("part", ["gates", "loss"])
def test_gradients_of_gates_alone_and_of_the_loss_alone(part: str, random: Callable[..., Tensor]) -> None:
    b, length, e = 2, 20, 40
    logits, bias, real = random(b * length, e), torch.zeros(e, device=random(1).device), random(b, length) > 0
    of_loss, gating = part == "loss", Gating(3, True, 1.0, 0.3)
    *_, exact = in_fp64(logits, bias, real, gating, (not of_loss, of_loss))
    leaf = logits.clone().requires_grad_()
    _, gate, loss = routing.Choosing.apply(leaf, bias, real, gating)
    (grad,) = torch.autograd.grad((loss if of_loss else weighed(gate)).square().sum(), leaf)
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-5)
    assert exact.abs().max() > 1e-2
    without = routing.Choosing.apply(leaf, bias, real, gating._replace(loss_weight=0.0))
    assert without[2] is None
    assert torch.equal(without[1], gate)


def test_a_sequence_of_padding_alone_has_no_loss(random: Callable[..., Tensor]) -> None:
    logits, bias = random(12, 8), torch.zeros(8, device=random(1).device)
    real = torch.tensor([[False] * 6, [True] * 6], device=bias.device)
    gating = Gating(2, True, 1.0, 1.0)
    leaf = logits.requires_grad_()
    *_, both = routing.Choosing.apply(leaf, bias, real, gating)
    *_, alone = routing.Choosing.apply(leaf[6:], bias, real[1:], gating)
    assert both == alone > 0
    assert not torch.autograd.grad(both, leaf)[0][:6].any()


def test_the_lower_of_equal_experts_comes_first_and_what_is_no_number_before_all(device: torch.device) -> None:
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[nan] * 5, [0.0, nan, inf, 1.0, nan], [-inf] * 5, [0.0, 1.0, 0.0, 1.0, 0.0]], device=device)
    bias, real = torch.zeros(5, device=device), torch.ones(1, 4, dtype=torch.bool, device=device)
    plain = Gating(4, normalised=False, scaled=1.0, loss_weight=0.0)
    expert, score, *_ = routing.choose_experts(logits, bias, real, plain)
    assert expert.tolist() == [[0, 1, 2, 3], [1, 4, 2, 3], [0, 1, 2, 3], [1, 3, 0, 2]]
    torch.testing.assert_close(score, logits.sigmoid().gather(-1, expert), equal_nan=True)
    bias = torch.tensor([0.0, -inf, 0.0, -inf, -inf], device=device)
    assert routing.choose_experts(logits[3:], bias, real[:, 3:], plain._replace(k=5))[0].tolist() == [[0, 2, 1, 3, 4]]


@pytest.mark.parametrize(("t", "e", "k"), [(200, 96, 3), (1, 5, 5), (0, 4, 2), (130, 1, 1), (70, 300, 2), (64, 8, 2)])
def test_pairs_are_sorted_as_torch_sorts_them(
    t: int, e: int, k: int, random: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    if random(1).device.type == "cuda":
        t *= 100
    expert = (random(t, e) + 2 * random(e)).topk(k).indices  # some have many, some none
    real = random(t) > -1
    found = dispatch.Plan(*routing.sort_by_expert(expert, real, e))
    monkeypatch.setattr(dispatch.support, "runs_triton", lambda _: False)
    for one, other in zip(found, dispatch.plan(expert, real, e), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    monkeypatch.setattr(dispatch.support, "runs_triton", lambda _: True)
    turned = expert.t().contiguous().t()
    assert all(torch.equal(*pair) for pair in zip(found, dispatch.plan(turned, real, e), strict=True))


def test_operands_that_do_not_fit_are_said(random: Callable[..., Tensor]) -> None:
    logits, bias = random(6, 8), random(8)
    real = bias.new_ones(2, 3, dtype=torch.bool)
    gating = Gating(2, True, 1.0, 0.1)
    with pytest.raises(ValueError, match="9 of 8 experts"):
        routing.choose_experts(logits, bias, real, gating._replace(k=9))
    with pytest.raises(ValueError, match="FP32"):
        routing.choose_experts(logits.double(), bias, real, gating)
    with pytest.raises(ValueError, match="one for each of 6 tokens"):
        routing.choose_experts(logits, bias, real[:1], gating)
    with pytest.raises(ValueError, match="one for each of 6 tokens"):
        routing.sort_by_expert(logits.topk(2).indices, real, 8)


@pytest.mark.parametrize("shares", [True, False])
def test_the_router_chooses_the_same_with_them_and_without(
    shares: bool, random: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(MOE, num_experts=24, top_k=4, routed_scaling_factor=2.5, sequence_loss_weight=0.3)
    b, length, e = 2, 30, config.num_experts
    logits, real = random(b * length, e), random(b, length) > -1
    layer = router.Router(config, 8).to(logits.device)
    layer.selection_bias.copy_(0.1 * random(e))

    def through(by_kernel: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        monkeypatch.setattr(router, "runs_triton", lambda _: by_kernel)
        leaf = logits.to(dtype).requires_grad_()
        choice = layer.choose(leaf, real, shares=shares)
        loss = choice.sequence_loss
        if choice.share_be is not None:
            loss = sequence_balance_loss(choice.share_be, choice.expert_tk, real, config.sequence_loss_weight)
        assert (loss is not None) == shares
        parts = [choice.gate_tk * torch.arange(1, config.top_k + 1, device=leaf.device)]
        parts += [] if loss is None else [loss]
        (grad,) = torch.autograd.grad(sum(part.square().sum() for part in parts), leaf)
        return [choice.expert_tk, choice.gate_tk.detach(), *(part.detach() for part in parts[1:]), grad]

    (expert, *found), (other, *without), (_, *exact) = through(True), through(False), through(False, torch.float64)
    assert torch.equal(expert, other)
    for each, theirs, right in zip(found, without, exact, strict=True):
        assert error(each, right) <= allowed(theirs, right)
        assert error(each, right) < 1e-5
