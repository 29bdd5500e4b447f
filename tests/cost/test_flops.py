"""FLOPs and parameters, against the published figures of DeepSeek-V3 and against torch's own counter."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moe_train.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig
from moe_train.cost.flops import forward_flops, parameter_counts, training_flops_per_token

MOE = MoEConfig(
    num_experts=8,
    top_k=2,
    num_shared_experts=1,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    norm_topk_prob=True,
    routed_scaling_factor=1.0,
    bias_update_speed=0.001,
    sequence_loss_weight=0.0001,
)
GQA = GQAConfig("gqa", num_attention_heads=4, num_key_value_heads=2, head_dim=8)
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
        "dense_twin_of_moe": False,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "initializer_range": 0.02,
        "dropout": 0.0,
    }
    return ModelConfig(attention=attention, moe=moe, **(settings | changes))


DEEPSEEK_V3 = model(
    MLAConfig(
        "mla", 128, kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    ),
    dataclasses.replace(MOE, num_experts=256, top_k=8, moe_intermediate_size=2048, first_k_dense_replace=3),
    hidden_size=7168,
    num_hidden_layers=61,
    intermediate_size=18432,
)


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


def test_deepseek_v3_has_its_published_parameters() -> None:
    counts = parameter_counts(DEEPSEEK_V3, 129280)
    assert round(counts.total / 1e9, 2) == 671.03
    assert round(counts.active / 1e9, 2) == 37.55


def test_deepseek_v3_trains_at_its_published_flops_per_token() -> None:
    assert training_flops_per_token(DEEPSEEK_V3, 4096, 129280) == pytest.approx(250e9, rel=0.005)


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


def test_a_dense_twin_costs_what_the_mixture_costs() -> None:
    wide = dataclasses.replace(MOE, moe_intermediate_size=512)
    mixture = model(moe=wide, intermediate_size=1024)
    twin = dataclasses.replace(mixture, dense_twin_of_moe=True)
    cost, twin_cost = (training_flops_per_token(m, T, VOCAB) for m in (mixture, twin))
    assert twin_cost == pytest.approx(cost, rel=0.01)
    assert forward_flops(twin, T, VOCAB)["router"] == 0
    counts = parameter_counts(twin, VOCAB)
    assert counts.total == counts.active < parameter_counts(mixture, VOCAB).total
