"""Load balancing against its published formulas."""

from __future__ import annotations

import math

import pytest
import torch

from moe_train.config import MoEConfig
from moe_train.model.balancing import load_statistics, sequence_balance_loss, update_selection_bias
from moe_train.model.router import Router, Routing


def router(num_experts: int = 4, top_k: int = 2) -> Router:
    config = MoEConfig(num_experts, top_k, 0, 8, 0, True, 1.0, 0.01, 0.0)
    made = Router(config, 8)
    torch.nn.init.normal_(made.weight)
    return made


def test_the_bias_of_overloaded_experts_falls_and_that_of_underloaded_ones_rises_by_the_speed() -> None:
    routers = [router(), router()]
    counts = torch.tensor([[10, 0, 5, 5], [1, 1, 1, 1]])
    update_selection_bias(routers, counts, speed=0.01)
    update_selection_bias(routers, counts, speed=0.01)
    torch.testing.assert_close(routers[0].selection_bias, torch.tensor([-0.02, 0.02, 0.0, 0.0]))
    assert routers[1].selection_bias.tolist() == [0.0] * 4


def test_bias_updates_even_out_a_skewed_router() -> None:
    torch.manual_seed(0)
    made = router(num_experts=8)
    made.weight.data[0] += 1.0
    x = torch.randn(2000, 8) + 0.3
    first = None
    for _ in range(300):
        counts = torch.bincount(made(x).expert_tk.flatten(), minlength=8)
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
    routing = Routing(chosen, affinity.gather(1, chosen), affinity)
    assert sequence_balance_loss(routing, 2, 0.01).item() == pytest.approx(expected, rel=1e-12)


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
