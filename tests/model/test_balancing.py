"""Load balancing against its published formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from moe_train.config import MoEConfig
from moe_train.model.balancing import (
    batch_balance_loss,
    load_statistics,
    router_z_loss,
    sequence_balance_loss,
    update_selection_bias,
)
from moe_train.model.router import Router


@pytest.fixture
def router(moe: Callable[..., MoEConfig]) -> Callable[..., Router]:
    def make(**changes: object) -> Router:
        made = Router(moe(**changes), 8)
        torch.nn.init.normal_(made.weight)
        return made

    return make


def test_the_bias_of_overloaded_experts_falls_and_that_of_underloaded_ones_rises_by_the_speed(
    router: Callable[..., Router],
) -> None:
    routers = [router(num_experts=4), router(num_experts=4)]
    counts = torch.tensor([[10, 0, 5, 5], [1, 1, 1, 1]])
    update_selection_bias(routers, counts, speed=0.01)
    update_selection_bias(routers, counts, speed=0.01)
    torch.testing.assert_close(routers[0].selection_bias, torch.tensor([-0.02, 0.02, 0.0, 0.0]))
    assert routers[1].selection_bias.tolist() == [0.0] * 4


def test_bias_updates_even_out_a_skewed_router(router: Callable[..., Router]) -> None:
    torch.manual_seed(0)
    made = router(num_experts=8)
    made.weight.data[0] += 1.0
    x = torch.randn(2000, 8) + 0.3
    first = None
    for _ in range(300):
        counts = torch.bincount(made.choose_experts(made(x).scores_te).expert_tk.flatten(), minlength=8)
        violation = load_statistics(counts[None])["moe/max_violation"]
        first = first or violation
        update_selection_bias([made], counts[None], speed=0.01)
    assert first is not None
    assert first > 0.7
    assert violation < 0.2


def test_the_sequence_loss_equals_its_definition() -> None:
    torch.manual_seed(0)
    affinity = torch.rand(6, 4, dtype=torch.float64)  # two sequences of three tokens
    chosen = affinity.topk(2, dim=-1).indices
    expected = 0.0
    for s in range(2):
        rows = range(3 * s, 3 * s + 3)
        for e in range(4):
            f = 4 / (2 * 3) * sum(int(e in chosen[t].tolist()) for t in rows)
            p = sum((affinity[t, e] / affinity[t].sum()).item() for t in rows) / 3
            expected += 0.01 * f * p
    assert sequence_balance_loss(affinity, chosen, 2, 0.01).item() == pytest.approx(expected, rel=1e-12)


def test_the_batch_loss_equals_its_definition_and_is_alpha_at_an_even_load() -> None:
    torch.manual_seed(0)
    scores = torch.rand(6, 4, dtype=torch.float64)
    chosen = scores.topk(2, dim=-1).indices.tolist()
    counts = torch.tensor([sum(e in row for row in chosen) for e in range(4)])
    p = (scores / scores.sum(-1, keepdim=True)).mean(0)
    expected = 0.01 * 4 * sum(counts[e].item() / 12 * p[e].item() for e in range(4))
    assert batch_balance_loss(scores, counts, 0.01).item() == pytest.approx(expected, rel=1e-12)
    even = torch.full((8, 4), 0.25, dtype=torch.float64)
    assert batch_balance_loss(even, torch.full((4,), 4), 0.01).item() == pytest.approx(0.01, rel=1e-12)


def test_the_batch_loss_of_ranks_averages_to_that_of_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    scores = torch.rand(8, 4, dtype=torch.float64, requires_grad=True)
    counts = [torch.tensor([3, 1, 2, 2]), torch.tensor([0, 4, 4, 0])]
    whole = batch_balance_loss(scores, counts[0] + counts[1], 0.01)

    def reduced(tensor: torch.Tensor) -> None:
        tensor.copy_((counts[0] + counts[1]).double())

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", reduced)
    ranks = [batch_balance_loss(part, mine, 0.01) for part, mine in zip(scores.split(4), counts, strict=True)]
    mean = torch.stack(ranks).mean()
    torch.testing.assert_close(mean, whole, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(loss, scores, retain_graph=True)[0] for loss in (mean, whole))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_the_router_z_loss_is_the_mean_squared_log_partition() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    expected = (math.log(2) ** 2 + math.log(math.e + math.e**2) ** 2) / 2
    assert router_z_loss(logits, 0.1).item() == pytest.approx(0.1 * expected, rel=1e-12)


def test_load_statistics_of_an_even_a_skewed_and_a_dead_load() -> None:
    figures = load_statistics(torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0]]))
    assert figures["moe/layer_0/max_violation"] == 0
    assert figures["moe/layer_0/load_entropy"] == pytest.approx(1)
    assert figures["moe/layer_1/max_violation"] == 3
    assert figures["moe/layer_1/load_entropy"] == 0
    assert figures["moe/max_violation"] == 3
    assert figures["moe/load_entropy"] == pytest.approx(0.5)
    assert figures["moe/dead_experts"] == 3
    half = load_statistics(torch.tensor([[1, 1, 0, 0]]))["moe/load_entropy"]
    assert half == pytest.approx(math.log(2) / math.log(4))
