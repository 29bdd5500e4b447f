"""FLOPs and parameters, against plain modules and torch's own counter."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_model import MOE
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moe_train.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, MTPConfig
from moe_train.cost.flops import forward_flops, parameter_counts, training_flops_per_token

EXPERT_CHOICE = dataclasses.replace(
    MOE,
    routing="expert_choice",
    norm_topk_prob=False,
    capacity_factor=1.0,
    bias_update_speed=0.0,
    sequence_loss_weight=0.0,
)
MTP = MTPConfig(depth=2, loss_weight=0.3, late_loss_weight=0.1, late_from=0.5)
GQA = GQAConfig("gqa", num_attention_heads=4, num_key_value_heads=2, head_dim=8, qk_norm=None)
MLA = MLAConfig(
    "mla",
    num_attention_heads=4,
    kv_lora_rank=12,
    q_lora_rank=20,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
)
MLA_FULL_Q = dataclasses.replace(MLA, q_lora_rank=None)
VOCAB, T = 128, 24


def model(attention: GQAConfig | MLAConfig = GQA, moe: MoEConfig | None = MOE, **changes: object) -> ModelConfig:
    settings = {
        "name": "tiny",
        "vocab_size": None,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "intermediate_size": 48,
        "dense_twin_of_moe": None,
        "mtp": None,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "initializer_range": 0.02,
        "dropout": 0.0,
    }
    return ModelConfig(attention=attention, moe=moe, **(settings | changes))


class SwiGLU(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(hidden, width, bias=False) for _ in range(2))
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    """Attention from plain Linears with every query meeting every key (no causal half); rotations left out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        a, hidden = config.attention, config.hidden_size
        self.heads = a.num_attention_heads
        if isinstance(a, MLAConfig):
            self.qk, self.v = a.qk_nope_head_dim + a.qk_rope_head_dim, a.v_head_dim
            queries = self.heads * self.qk
            if a.q_lora_rank is None:
                self.q: nn.Module = nn.Linear(hidden, queries, bias=False)
            else:
                down = nn.Linear(hidden, a.q_lora_rank, bias=False)
                self.q = nn.Sequential(down, nn.RMSNorm(a.q_lora_rank), nn.Linear(a.q_lora_rank, queries, bias=False))
            self.kv_a = nn.Linear(hidden, a.kv_lora_rank + a.qk_rope_head_dim, bias=False)
            self.kv_norm = nn.RMSNorm(a.kv_lora_rank)
            self.kv_b = nn.Linear(a.kv_lora_rank, self.heads * (a.qk_nope_head_dim + a.v_head_dim), bias=False)
        else:
            self.qk = self.v = a.head_dim
            self.q = nn.Linear(hidden, self.heads * a.head_dim, bias=False)
            self.k, self.v_proj = (nn.Linear(hidden, a.num_key_value_heads * a.head_dim, bias=False) for _ in range(2))
        self.o = nn.Linear(self.heads * self.v, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[0]
        q = self.q(x).view(tokens, self.heads, self.qk).transpose(0, 1)
        if hasattr(self, "kv_a"):
            compressed = self.kv_norm(self.kv_a(x)[:, : self.kv_norm.normalized_shape[0]])
            self.kv_b(compressed)
        else:
            self.k(x), self.v_proj(x)
        k = torch.empty(self.heads, tokens, self.qk, device=x.device)
        v = torch.empty(self.heads, tokens, self.v, device=x.device)
        mixed = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return self.o(mixed.transpose(0, 1).reshape(tokens, -1))


class Reference(nn.Module):
    """The model of a configuration; each token passes through its first top_k experts, which costs what any would."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, self.config = config.hidden_size, config
        self.embedding = nn.Embedding(VOCAB, hidden)
        self.attention = nn.ModuleList(Attention(config) for _ in range(config.num_hidden_layers))
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(2 * config.num_hidden_layers + 1))
        self.ffn, self.routers = nn.ModuleList(), nn.ModuleList()
        for layer in range(config.num_hidden_layers):
            moe = config.moe if config.moe and layer >= config.moe.first_k_dense_replace else None
            self.routers.append(nn.Linear(hidden, moe.num_experts, bias=False) if moe else nn.Identity())
            count = moe.num_shared_experts + moe.num_experts if moe else 1
            width = moe.moe_intermediate_size if moe else config.intermediate_size
            self.ffn.append(nn.ModuleList(SwiGLU(hidden, width) for _ in range(count)))
        self.head = nn.Linear(hidden, VOCAB, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embedding.weight

    def visited(self, layer: int) -> list[nn.Module]:
        moe = self.config.moe
        experts = list(self.ffn[layer])
        return experts if moe is None or len(experts) == 1 else experts[: moe.num_shared_experts + moe.top_k]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer, attention in enumerate(self.attention):
            x = x + attention(self.norms[2 * layer](x))
            y = self.norms[2 * layer + 1](x)
            self.routers[layer](y)
            x = x + sum(expert(y) for expert in self.visited(layer))
        return self.head(self.norms[-1](x))


CONFIGS = [
    pytest.param(model(), id="gqa-moe"),
    pytest.param(model(MLA), id="mla-moe"),
    pytest.param(model(MLA_FULL_Q), id="mla-without-q-compression"),
    pytest.param(model(moe=None, tie_word_embeddings=True), id="dense-tied"),
    pytest.param(model(moe=dataclasses.replace(MOE, num_shared_experts=0, first_k_dense_replace=0)), id="no-shared"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_forward_flops_are_what_torch_counts_but_for_the_acausal_half(config: ModelConfig) -> None:
    with torch.device("meta"):
        reference = Reference(config)
        with FlopCounterMode(display=False) as counter:
            reference(torch.zeros(T, dtype=torch.long))
    parts = forward_flops(config, T, VOCAB)
    parts["attention_core"] *= 2 * T / (T + 1)
    assert T * sum(parts.values()) == pytest.approx(counter.get_total_flops())


@pytest.mark.parametrize("config", CONFIGS)
def test_parameters_are_those_of_the_built_model(config: ModelConfig) -> None:
    with torch.device("meta"):
        reference = Reference(config)
    counts = parameter_counts(config, VOCAB)
    assert counts.total == sum(p.numel() for p in reference.parameters())
    visited = {id(e) for layer in range(config.num_hidden_layers) for e in reference.visited(layer)}
    idle = [e for ffn in reference.ffn for e in ffn if id(e) not in visited]
    assert counts.active == counts.total - sum(p.numel() for e in idle for p in e.parameters())


def test_training_costs_what_torch_counts_for_forward_and_backward() -> None:
    config = model(moe=None)
    tokens = torch.randn(T, config.hidden_size, requires_grad=True)
    layer = SwiGLU(config.hidden_size, config.intermediate_size)
    with FlopCounterMode(display=False) as counter:
        layer(tokens).sum().backward()
    dense_ffn = forward_flops(config, T, VOCAB)["dense_ffn"]
    assert T * 3 * dense_ffn / config.num_hidden_layers == counter.get_total_flops()
    assert training_flops_per_token(config, T, VOCAB) == 3 * sum(forward_flops(config, T, VOCAB).values())


@given(top_k=st.integers(1, 16), spare=st.integers(0, 16), shared=st.integers(0, 3))
def test_experts_that_are_not_visited_cost_parameters_but_no_flops(top_k: int, spare: int, shared: int) -> None:
    moe = dataclasses.replace(MOE, num_experts=top_k + spare, top_k=top_k, num_shared_experts=shared)
    few = dataclasses.replace(moe, num_experts=top_k)
    parts, fewer_parts = (forward_flops(model(moe=m), T, VOCAB) for m in (moe, few))
    counts, fewer = (parameter_counts(model(moe=m), VOCAB) for m in (moe, few))
    router = 2 * 32 * spare  # MoE layers x hidden x spare
    assert counts.active - fewer.active == router
    assert counts.total - fewer.total == router + 2 * spare * 3 * 32 * 16
    assert sum(parts.values()) - sum(fewer_parts.values()) == pytest.approx(2 * router)


@pytest.mark.parametrize("kind", ["equal_flops", "equal_params"])
def test_a_dense_twin_costs_what_the_mixture_costs(kind: str) -> None:
    wide = dataclasses.replace(MOE, moe_intermediate_size=512)
    mixture = model(moe=wide, intermediate_size=1024, mtp=MTP)
    twin = dataclasses.replace(mixture, dense_twin_of_moe=kind)
    counts, twin_counts = parameter_counts(mixture, VOCAB), parameter_counts(twin, VOCAB)
    assert forward_flops(twin, T, VOCAB)["router"] == 0
    assert twin_counts.total == twin_counts.active + twin_counts.mtp
    if kind == "equal_params":
        assert twin_counts.total == pytest.approx(counts.total, rel=0.01)
    else:
        # An MTP module works on less than all positions, so its share of the averaged width costs a little less.
        cost, twin_cost = (training_flops_per_token(m, T, VOCAB) for m in (mixture, twin))
        assert twin_cost == pytest.approx(cost, rel=0.02)
        assert twin_counts.total < counts.total


@given(factor=st.floats(0.25, 6.0))
def test_capacity_bounds_the_experts_a_token_visits(factor: float) -> None:
    token_choice = dataclasses.replace(MOE, capacity_factor=factor)
    expert_choice = dataclasses.replace(EXPERT_CHOICE, capacity_factor=factor)
    assert MOE.experts_per_token == MOE.top_k
    assert token_choice.experts_per_token == pytest.approx(min(1, factor) * MOE.top_k)  # no token visits more
    assert expert_choice.experts_per_token == pytest.approx(min(factor * MOE.top_k, MOE.num_experts))
    expert = 2 * 3 * 32 * 16  # MoE layers x weights
    for moe in (token_choice, expert_choice):
        counts = parameter_counts(model(moe=moe), VOCAB)
        assert counts.total - counts.active == pytest.approx((8 - moe.experts_per_token) * expert, abs=1)
        routed = forward_flops(model(moe=moe), T, VOCAB)["routed_experts"]
        assert routed == pytest.approx(2 * moe.experts_per_token * expert)


def test_a_module_of_multi_token_prediction_costs_as_much_as_it_has_positions() -> None:
    first, both = (model(mtp=dataclasses.replace(MTP, depth=depth)) for depth in (1, 2))
    # The same model with a last layer more: that layer, the join and the head on T - 1 of T positions.
    deeper, plain = (forward_flops(model(num_hidden_layers=n), T - 1, VOCAB) for n in (4, 3))
    layer = sum(deeper.values()) - sum(plain.values())
    module = layer + 2 * (2 * 32 * 32 + 32 * VOCAB)
    assert forward_flops(first, T, VOCAB)["mtp"] == pytest.approx(module * (T - 1) / T)
    assert forward_flops(both, T, VOCAB)["mtp"] < 2 * forward_flops(first, T, VOCAB)["mtp"]
    assert parameter_counts(both, VOCAB).mtp == 2 * parameter_counts(first, VOCAB).mtp


def test_modules_of_multi_token_prediction_count_in_the_total_but_are_not_active() -> None:
    without, with_mtp = parameter_counts(model(), VOCAB), parameter_counts(model(mtp=MTP), VOCAB)
    assert without.mtp == 0 < with_mtp.mtp
    assert with_mtp.total == without.total + with_mtp.mtp
    assert with_mtp.active == without.active
