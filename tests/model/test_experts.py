"""The MoE layer against a loop over tokens and their experts, and the dispatch against plain indexing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.config import MoEConfig
from moe_train.model import dispatch
from moe_train.model.experts import MoELayer


def layer(**changes: object) -> MoELayer:
    settings: dict[str, object] = {
        "num_experts": 8,
        "top_k": 2,
        "num_shared_experts": 1,
        "moe_intermediate_size": 8,
        "first_k_dense_replace": 0,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "bias_update_speed": 0.0,
        "sequence_loss_weight": 0.01,
    }
    made = MoELayer(MoEConfig(**(settings | changes)), hidden_size=16).double()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    return made


def one_token_at_a_time(made: MoELayer, x_td: torch.Tensor) -> torch.Tensor:
    """Equations 12 to 16 of arXiv 2412.19437, read literally."""
    config = made.config
    rows = []
    for x in x_td:
        affinity = torch.sigmoid(made.router.weight @ x)
        chosen = (affinity + made.router.selection_bias).topk(config.top_k).indices.tolist()
        total = sum(affinity[e] for e in chosen) if config.norm_topk_prob else 1.0
        y = torch.zeros_like(x)
        for e in chosen:
            gate, up = (made.experts.gate_up_proj[e] @ x).chunk(2)
            value = made.experts.down_proj[e] @ (F.silu(gate) * up)
            y = y + config.routed_scaling_factor * affinity[e] / total * value
        if made.shared_experts is not None:
            gate, up = (made.shared_experts.gate_up_proj.weight @ x).chunk(2)
            y = y + made.shared_experts.down_proj.weight @ (F.silu(gate) * up)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"top_k": 1},
        {"top_k": 8},
        {"num_shared_experts": 0},
        {"num_shared_experts": 2},
        {"norm_topk_prob": False},
        {"num_experts": 1, "top_k": 1},
    ],
    ids=str,
)
def test_the_layer_equals_a_loop_over_tokens_in_value_and_gradient(changes: dict[str, object]) -> None:
    made = layer(**changes)
    made.router.selection_bias.copy_(torch.linspace(-0.2, 0.2, made.config.num_experts))
    x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 7, 16, dtype=torch.float64)
    inputs = [x, *made.parameters()]

    ours = torch.autograd.grad((made(x).hidden_btd * weights).sum(), inputs, materialize_grads=True)
    expected = one_token_at_a_time(made, x.flatten(0, 1)).view_as(x)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs, materialize_grads=True)

    torch.testing.assert_close(made(x).hidden_btd, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_all_tokens_may_go_to_one_expert_and_others_may_stay_empty() -> None:
    made = layer(top_k=1)
    made.router.selection_bias[3] = 10.0
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    out = made(x)
    assert out.counts_e.tolist() == [0, 0, 0, 9, 0, 0, 0, 0]
    torch.testing.assert_close(out.hidden_btd[0], one_token_at_a_time(made, x[0]), rtol=1e-12, atol=1e-12)


def test_the_selection_bias_steers_the_choice_but_not_the_gate_values() -> None:
    made = layer(top_k=8)  # all experts are chosen anyway
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    before = made(x).hidden_btd
    made.router.selection_bias.copy_(torch.randn(8))
    torch.testing.assert_close(made(x).hidden_btd, before, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_plan_sorts_every_pair_to_its_expert_once(data: st.DataObject) -> None:
    tokens, experts = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 9))
    top_k = data.draw(st.integers(1, experts))
    chosen = [data.draw(st.permutations(range(experts)))[:top_k] for _ in range(tokens)]
    made = dispatch.plan(torch.tensor(chosen), experts)

    flat = [e for row in chosen for e in row]
    assert made.counts_e.tolist() == [flat.count(e) for e in range(experts)]
    assert made.ends_e.tolist() == torch.tensor(made.counts_e.tolist()).cumsum(0).tolist()
    assert [flat[p] for p in made.pair_n.tolist()] == sorted(flat)
    assert made.pair_n[made.place_n].tolist() == list(range(len(flat)))


def test_dispatch_and_its_inverse_have_right_gradients_by_finite_differences() -> None:
    made = dispatch.plan(torch.tensor([[2, 0], [0, 1], [2, 1]]), 3)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)

    def there_and_back(x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        rows = dispatch.to_experts(x, made, 2) * dispatch.gates_to_experts(gates, made)
        return dispatch.from_experts(rows**2, made, 2)

    assert torch.autograd.gradcheck(there_and_back, (x, gates))
