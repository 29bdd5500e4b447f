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
from moe_train.model.router import Router, sequence_shares


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


def test_a_model_without_routers_has_nothing_to_balance() -> None:
    update_selection_bias([], torch.zeros(0, 0, dtype=torch.int64), speed=0.01)


def test_bias_updates_even_out_a_skewed_router(router: Callable[..., Router]) -> None:
    torch.manual_seed(0)
    made = router(num_experts=8)
    made.weight.data[0] += 1.0
    x = torch.randn(2000, 8) + 0.3
    first = None
    for _ in range(300):
        counts = torch.bincount(made.choose_experts(made.scores(made.logits(x))).expert_tk.flatten(), minlength=8)
        violation = load_statistics(counts[None])["moe/max_violation"]
        first = first or violation
        update_selection_bias([made], counts[None], speed=0.01)
    assert first is not None
    assert first > 0.7
    assert violation < 0.2


REAL = torch.ones(6, dtype=torch.bool)


def test_the_sequence_loss_equals_its_definition_and_leaves_padding_out() -> None:
    torch.manual_seed(0)
    affinity = torch.rand(9, 4, dtype=torch.float64)  # three sequences of three tokens, the last of padding alone
    chosen = affinity.topk(2, dim=-1).indices
    for lengths in ((3, 3, 3), (3, 2, 0)):
        expected = 0.0
        for s, length in enumerate(lengths):
            rows = range(3 * s, 3 * s + length)
            for e in range(4 if length else 0):
                f = 4 / (2 * length) * sum(int(e in chosen[t].tolist()) for t in rows)
                p = sum((affinity[t, e] / affinity[t].sum()).item() for t in rows) / length
                expected += 0.01 * f * p * length
        real = torch.arange(3) < torch.tensor(lengths).unsqueeze(1)
        assert sequence_balance_loss(sequence_shares(affinity, real), chosen, real, 0.01).item() == pytest.approx(
            expected, rel=1e-12
        )


def test_the_batch_loss_equals_its_definition_and_is_alpha_at_an_even_load() -> None:
    torch.manual_seed(0)
    scores = torch.rand(6, 4, dtype=torch.float64)
    chosen = scores.topk(2, dim=-1).indices.tolist()
    counts = torch.tensor([sum(e in row for row in chosen) for e in range(4)])
    p = (scores / scores.sum(-1, keepdim=True)).mean(0)
    expected = 0.01 * 4 * sum(counts[e].item() / 12 * p[e].item() for e in range(4))
    assert batch_balance_loss(scores, counts, REAL, 0.01).item() == pytest.approx(6 * expected, rel=1e-12)
    padded = torch.cat((scores, torch.rand(2, 4, dtype=torch.float64)))
    real = torch.tensor([True] * 6 + [False] * 2)
    assert batch_balance_loss(padded, counts, real, 0.01).item() == pytest.approx(6 * expected, rel=1e-12)
    even = torch.full((6, 4), 0.25, dtype=torch.float64)
    assert batch_balance_loss(even, torch.full((4,), 3), REAL, 0.01).item() == pytest.approx(6 * 0.01, rel=1e-12)


def test_the_batch_loss_of_ranks_adds_up_to_that_of_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    scores = torch.rand(8, 4, dtype=torch.float64, requires_grad=True)
    counts = [torch.tensor([3, 1, 2, 2]), torch.tensor([0, 2, 2, 0])]
    real = torch.tensor([True] * 6 + [False] * 2)  # the second rank has padding
    whole = batch_balance_loss(scores, counts[0] + counts[1], real, 0.01)

    def reduced(tensor: torch.Tensor) -> None:
        tensor.copy_((counts[0] + counts[1]).double())

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", reduced)
    parts = zip(scores.split(4), counts, real.split(4), strict=True)
    together = torch.stack([batch_balance_loss(part, mine, there, 0.01) for part, mine, there in parts]).sum()
    torch.testing.assert_close(together, whole, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(loss, scores, retain_graph=True)[0] for loss in (together, whole))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_the_router_z_loss_is_the_squared_log_partition_of_every_token_but_padding() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    expected = math.log(2) ** 2 + math.log(math.e + math.e**2) ** 2
    real = torch.tensor([True, True, False])
    assert router_z_loss(logits, real, 0.1).item() == pytest.approx(0.1 * expected, rel=1e-12)


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
