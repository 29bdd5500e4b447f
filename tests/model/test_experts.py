"""The MoE layer against a loop over tokens and their experts, and the dispatch against plain indexing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import Operations
from torch import Tensor
from torch._ops import OpOverload

from moe_train.config import MoEConfig
from moe_train.model import dispatch, slots
from moe_train.model.experts import MoELayer
from moe_train.model.router import Choice

Make = Callable[..., MoEConfig]


def layer(config: MoEConfig) -> MoELayer:
    made = MoELayer(config, hidden_size=16).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    made.router.selection_bias.copy_(torch.linspace(-0.2, 0.2, config.num_experts))
    return made


def expert(made: MoELayer, e: int, x: Tensor) -> Tensor:
    gate, up = (made.experts.gate_up_proj[e] @ x).chunk(2)
    return made.experts.down_proj[e] @ (F.silu(gate) * up)


def scores_of(made: MoELayer, x: Tensor) -> Tensor:
    logits = made.router.weight @ x
    return logits.sigmoid() if made.config.scoring_func == "sigmoid" else logits.softmax(-1)


def chosen_by(made: MoELayer, x: Tensor) -> list[int]:
    """The experts of one token, best first, with Python's own sorting."""
    c = made.config
    biased = (scores_of(made, x) + made.router.selection_bias).tolist()
    size = c.num_experts // c.n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(c.n_group)]

    def worth(group: list[int]) -> float:
        return sum(sorted((biased[e] for e in group), reverse=True)[: c.group_score_top_k])

    allowed = [e for group in sorted(groups, key=worth, reverse=True)[: c.topk_group] for e in group]
    return sorted(allowed, key=lambda e: biased[e], reverse=True)[: c.top_k]


def gated_sum(made: MoELayer, x: Tensor, experts: list[int], gated_by: list[int]) -> Tensor:
    """`experts` of those chosen (`gated_by`), weighted, and the shared ones."""
    c = made.config
    scores = scores_of(made, x)
    total = sum(scores[e] for e in gated_by) if c.norm_topk_prob else 1.0
    y = sum((c.routed_scaling_factor * scores[e] / total * expert(made, e, x) for e in experts), torch.zeros_like(x))
    if made.shared_experts is not None:
        gate, up = (made.shared_experts.gate_up_proj.weight @ x).chunk(2)
        y = y + made.shared_experts.down_proj.weight @ (F.silu(gate) * up)
    return y


def one_token_at_a_time(made: MoELayer, x_td: Tensor) -> Tensor:
    """Equations 12 to 16 of arXiv 2412.19437, read literally."""
    rows = []
    for x in x_td:
        chosen = chosen_by(made, x)
        rows.append(gated_sum(made, x, chosen, chosen))
    return torch.stack(rows)


def with_limited_places(made: MoELayer, x_td: Tensor) -> Tensor:
    """The same, each expert taking the first tokens up to its capacity."""
    c = made.config
    assert c.capacity_factor is not None
    places = math.ceil(c.capacity_factor * len(x_td) * c.top_k / c.num_experts)
    taken = [0] * c.num_experts
    rows = []
    for x in x_td:
        chosen = chosen_by(made, x)
        kept = [e for e in chosen if taken[e] < places]
        for e in kept:
            taken[e] += 1
        rows.append(gated_sum(made, x, kept, chosen))
    return torch.stack(rows)


def with_experts_choosing(made: MoELayer, x_td: Tensor) -> Tensor:
    """arXiv 2202.09368, section 3.2: every expert sorts all tokens by their softmax scores."""
    c = made.config
    assert c.capacity_factor is not None
    places = math.ceil(c.capacity_factor * len(x_td) * c.top_k / c.num_experts)
    scores_te = torch.stack([scores_of(made, x) for x in x_td]).tolist()
    takers: list[list[int]] = [[] for _ in x_td]
    for e in range(c.num_experts):
        for t in sorted(range(len(x_td)), key=lambda t: scores_te[t][e], reverse=True)[:places]:
            takers[t].append(e)
    return torch.stack([gated_sum(made, x, takers[t], takers[t]) for t, x in enumerate(x_td)])


def assert_equal_in_value_and_gradient(made: MoELayer, reference: Callable[[MoELayer, Tensor], Tensor]) -> None:
    x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 7, 16, dtype=torch.float64)
    inputs = [x, *made.parameters()]
    out = made(x)[0]
    expected = reference(made, x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad((out * weights).sum(), inputs, materialize_grads=True)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs, materialize_grads=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"top_k": 1},
        {"top_k": 8},
        {"num_shared_experts": 0},
        {"num_shared_experts": 2, "routed_scaling_factor": 2.5},
        {"norm_topk_prob": False},
        {"scoring_func": "softmax"},
        {"scoring_func": "softmax", "norm_topk_prob": False},
        {"num_experts": 1, "top_k": 1},
        {"n_group": 4, "topk_group": 2},
        {"n_group": 4, "topk_group": 2, "group_score_top_k": 1, "scoring_func": "softmax"},
        {"n_group": 2, "topk_group": 1, "top_k": 4},
        {"n_group": 8, "topk_group": 3, "group_score_top_k": 1},
    ],
    ids=str,
)
def test_the_layer_equals_a_loop_over_tokens_in_value_and_gradient(changes: dict[str, object], moe: Make) -> None:
    assert_equal_in_value_and_gradient(layer(moe(**changes)), one_token_at_a_time)


@pytest.mark.parametrize("router", ["switch", "gshard"])
@pytest.mark.parametrize("capacity_factor", [0.3, 1.0, 1.25, 8.0])
def test_tokens_beyond_an_experts_capacity_are_dropped_the_latest_first(
    router: str, capacity_factor: float, moe: Make
) -> None:
    made = layer(moe(router, capacity_factor=capacity_factor, batch_loss_weight=0.0))
    assert_equal_in_value_and_gradient(made, with_limited_places)


@pytest.mark.parametrize("capacity_factor", [0.3, 1.0, 2.0])
def test_experts_that_choose_take_their_best_tokens(capacity_factor: float, moe: Make) -> None:
    assert_equal_in_value_and_gradient(
        layer(moe("expert_choice", capacity_factor=capacity_factor)), with_experts_choosing
    )


def test_nothing_is_dropped_out_of_training(moe: Make) -> None:
    made = layer(moe("switch", capacity_factor=0.3))
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    dropped = made(x)[1].dropped
    assert dropped is not None
    assert dropped > 0
    made.eval()
    torch.testing.assert_close(made(x)[0][0], one_token_at_a_time(made, x[0]), rtol=1e-12, atol=1e-12)
    assert made(x)[1].dropped is None


def test_all_tokens_may_go_to_one_expert_and_others_may_stay_empty(moe: Make) -> None:
    made = layer(moe(top_k=1))
    made.router.selection_bias[3] = 10.0
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    out, routed = made(x)
    assert routed.counts_e.tolist() == [0, 0, 0, 9, 0, 0, 0, 0]
    torch.testing.assert_close(out[0], one_token_at_a_time(made, x[0]), rtol=1e-12, atol=1e-12)


def test_one_expert_taking_all_drops_all_but_its_places(moe: Make) -> None:
    made = layer(moe("switch", top_k=1, capacity_factor=1.0))
    made.router.selection_bias[3] = 10.0
    x = torch.randn(1, 16, 16, dtype=torch.float64)
    routed = made(x)[1]
    assert routed.counts_e[3] == 16  # what was asked for: the balance loss and the statistics need it
    assert routed.dropped.item() == 14
    torch.testing.assert_close(made(x)[0][0], with_limited_places(made, x[0]), rtol=1e-12, atol=1e-12)


def test_experts_that_choose_take_padding_only_where_nothing_else_is_left(moe: Make) -> None:
    config = moe("expert_choice", capacity_factor=2.0)
    real = torch.tensor([True, False, True, False, False, False, True, False])
    taken = slots.by_experts(torch.rand(8, 8) + 0.1, real, config)
    assert slots.capacity(config, 8) == 4
    assert taken.counts_e.tolist() == [3] * 8
    assert taken.dropped == 0
    assert (taken.gate_n1.flatten() > 0).tolist() == real[taken.token_n].tolist()


ADDED_BY_ATOMICS = ("index_add", "index_put", "index_reduce", "scatter_add", "scatter_reduce", "embedding_dense")


def _in_any_order(_: Tensor, dim: int, index: Tensor, added: Tensor) -> bool:
    """Whether these sums are the same in any order: of whole numbers, or of a single one each."""
    sorted_ = index.sort(dim).values
    return bool((added == added.round()).all()) or not bool((sorted_.diff(dim=dim) == 0).any())


@pytest.mark.parametrize("router", ["switch", "gshard", "expert_choice", "loss_free"])
def test_nothing_is_added_up_in_an_order_that_a_gpu_would_change(router: str, moe: Make) -> None:
    made = layer(moe(router)).float()
    names: set[str] = set()

    def see(operation: OpOverload, args: tuple[Any, ...], out: object) -> None:
        name = operation.__name__
        exact = name.startswith("scatter_add") and _in_any_order(*args)
        if isinstance(out, Tensor) and out.is_floating_point() and not exact:
            names.add(name)

    with Operations(see):
        out, routed = made(torch.randn(2, 16, 16, requires_grad=True))
        (out.sum() + (0.0 if routed.auxiliary_loss is None else routed.auxiliary_loss)).backward()
    assert "index_select.default" in names
    assert not [name for name in names if name.startswith(ADDED_BY_ATOMICS)]


def test_ties_are_broken_the_same_way_every_time_and_never_choose_an_expert_twice(moe: Make) -> None:
    made = layer(moe(top_k=3))
    made.router.weight.data.zero_()
    made.router.selection_bias.zero_()
    x = torch.randn(1, 50, 16, dtype=torch.float64)
    chosen = [made.router.choose_experts(made.router.scores(made.router.logits(x[0]))).expert_tk for _ in range(3)]
    assert torch.equal(chosen[0], chosen[1])
    assert torch.equal(chosen[0], chosen[2])
    assert all(len(set(row)) == 3 for row in chosen[0].tolist())


def test_the_selection_bias_steers_the_choice_but_not_the_gate_values(moe: Make) -> None:
    made = layer(moe(top_k=8))  # all experts are chosen anyway
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    before = made(x)[0]
    made.router.selection_bias.copy_(torch.randn(8))
    torch.testing.assert_close(made(x)[0], before, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_token_never_leaves_its_groups(moe: Make, data: st.DataObject) -> None:
    n_group = data.draw(st.sampled_from([2, 4, 8]))
    topk_group = data.draw(st.integers(1, n_group))
    top_k = data.draw(st.integers(1, topk_group * (16 // n_group)))
    config = moe(num_experts=16, n_group=n_group, topk_group=topk_group, top_k=top_k)
    made = layer(config)
    scores_te = torch.rand(5, 16, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 10**6))))
    expert_tk = made.router.choose_experts(scores_te.double()).expert_tk
    for row in expert_tk.tolist():
        assert len(set(row)) == top_k
        assert len({e // (16 // n_group) for e in row}) <= topk_group


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_every_place_holds_one_pair_or_nothing(moe: Make, data: st.DataObject) -> None:
    tokens, experts = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 9))
    top_k = data.draw(st.integers(1, experts))
    factor = data.draw(st.floats(0.05, 4))
    chosen = [data.draw(st.permutations(range(experts)))[:top_k] for _ in range(tokens)]
    config = moe("gshard", num_experts=experts, top_k=top_k, capacity_factor=factor)
    real = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    choice = Choice(torch.tensor(chosen), torch.rand(tokens, top_k) + 0.1)
    made = slots.by_tokens(choice, torch.tensor(real), config)

    places = slots.capacity(config, tokens)
    flat = [e for row, counts in zip(chosen, real, strict=True) if counts for e in row]
    fitting = sum(min(flat.count(e), places) for e in range(experts))
    assert len(made.token_n) == experts * places
    assert int((made.gate_n1 > 0).sum()) == fitting
    assert made.dropped.item() == pytest.approx((len(flat) - fitting) / top_k, abs=1e-5)
    assert made.counts_e.tolist() == [flat.count(e) for e in range(experts)]
    for place, (token, gate) in enumerate(zip(made.token_n.tolist(), made.gate_n1.flatten().tolist(), strict=True)):
        assert gate == 0 or (real[token] and place // places in chosen[token])


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_plan_sorts_every_pair_to_its_expert_once(data: st.DataObject) -> None:
    tokens, experts = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 9))
    top_k = data.draw(st.integers(1, experts))
    chosen = [data.draw(st.permutations(range(experts)))[:top_k] for _ in range(tokens)]
    real = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    made = dispatch.plan(torch.tensor(chosen), torch.tensor(real), experts)

    flat = [e for row in chosen for e in row]
    counted = [e for row, counts in zip(chosen, real, strict=True) if counts for e in row]
    assert made.counts_e.tolist() == [counted.count(e) for e in range(experts)]
    assert made.ends_e.tolist() == torch.tensor([flat.count(e) for e in range(experts)]).cumsum(0).tolist()
    assert [flat[p] for p in made.pair_n.tolist()] == sorted(flat)
    assert made.pair_n[made.place_tk.flatten()].tolist() == list(range(len(flat)))


def test_dispatch_and_its_inverse_have_right_gradients_by_finite_differences() -> None:
    made = dispatch.plan(torch.tensor([[2, 0], [0, 1], [2, 1]]), torch.ones(3, dtype=torch.bool), 3)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)

    def there_and_back(x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        rows = dispatch.to_experts(x, made) * dispatch.gates_to_experts(gates, made)
        return dispatch.from_experts(rows**2, made)

    assert torch.autograd.gradcheck(there_and_back, (x, gates))
