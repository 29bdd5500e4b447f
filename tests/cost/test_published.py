"""The published architectures of configs/model: their figures, and the models transformers and we build from them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from moe_train.compose import CONFIGS
from moe_train.config import ModelConfig
from moe_train.cost.flops import forward_flops, parameter_counts, training_flops_per_token
from moe_train.cost.memory import cache_elements_per_token
from moe_train.model.transformer import Transformer
from moe_train.precision import matmul

ModelOf = Callable[..., ModelConfig]

# Billions of parameters as published: all, and a token's, the latter with the input embedding or without.
PUBLISHED = {
    "deepseek_v3": (671.03, 37.55, "with"),
    "deepseek_v2": (236, 21, "with"),
    "deepseek_v2_lite": (15.7, 2.4, "without"),
    "deepseek_moe_16b": (16.4, 2.8, "with"),
    "olmoe_1b_7b": (6.9, 1.3, "with"),
    "qwen3_30b_a3b": (30.5, 3.3, "with"),
    "mixtral_8x7b": (46.7, 12.9, "with"),
    "llama_3_1_8b": (8.03, 8.03, "with"),
}

# What the released configurations say beyond transformers' defaults.
IN_TRANSFORMERS: dict[str, PreTrainedConfig] = {
    "deepseek_v3": DeepseekV3Config(num_mtp_layers=0),
    "deepseek_v2": DeepseekV2Config(
        vocab_size=102400,
        hidden_size=5120,
        num_hidden_layers=60,
        intermediate_size=12288,
        num_attention_heads=128,
        q_lora_rank=1536,
        n_routed_experts=160,
        moe_intermediate_size=1536,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
    ),
    "deepseek_v2_lite": DeepseekV2Config(
        vocab_size=102400,
        hidden_size=2048,
        num_hidden_layers=27,
        intermediate_size=10944,
        num_attention_heads=16,
        q_lora_rank=None,
        moe_intermediate_size=1408,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
    ),
    "olmoe_1b_7b": OlmoeConfig(intermediate_size=1024),
    "qwen3_30b_a3b": Qwen3MoeConfig(num_hidden_layers=48, head_dim=128),
    "mixtral_8x7b": MixtralConfig(),
    "llama_3_1_8b": LlamaConfig(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8),
}


def vocabulary(model: ModelConfig) -> int:
    assert model.vocab_size is not None
    return model.vocab_size


def on_meta(model: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(model, vocabulary(model))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name: str, model_config: ModelOf) -> None:
    total, active, embedding = PUBLISHED[name]
    model = model_config(name)
    counts = parameter_counts(model, vocabulary(model))
    lookups = vocabulary(model) * model.hidden_size if embedding == "without" else 0
    # As far as published: half a unit in the last digit, or a whole one where digits were cut off.
    digits = {"deepseek_v3": 0.005, "deepseek_v2": 0.5}.get(name)
    assert counts.total / 1e9 == pytest.approx(total, abs=digits or 0.05)
    assert (counts.active - lookups) / 1e9 == pytest.approx(active, abs=digits or 0.06)


def test_deepseek_v3_without_its_input_embedding_has_36_6_billion_active_parameters(model_config: ModelOf) -> None:
    model = model_config("deepseek_v3")
    active = parameter_counts(model, vocabulary(model)).active - vocabulary(model) * model.hidden_size
    assert round(active / 1e9, 1) == 36.6


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_transformers_builds_as_many_parameters(name: str, model_config: ModelOf) -> None:
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(IN_TRANSFORMERS[name])
    model = model_config(name)
    assert parameter_counts(model, vocabulary(model)).total == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(("name", "overrides"), [*((name, []) for name in PUBLISHED), ("deepseek_v3", ["mtp=depth_1"])])
def test_our_model_has_as_many_parameters(name: str, overrides: list[str], model_config: ModelOf) -> None:
    model = model_config(name, *overrides)
    built = sum(p.numel() for p in on_meta(model).parameters())
    assert parameter_counts(model, vocabulary(model)).total == built


def grouped(x: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    """FLOPs of torch's grouped product, which its counter does not know: every row meets one weight."""
    return 2 * x[0] * weight[-2] * weight[-1]


EVERY_MODEL = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_forward_flops_are_what_torch_counts_on_the_model_at_full_size(
    name: str, model_config: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Autocast does not know the meta device, and torch's grouped product takes BF16 alone there.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(matmul, "compute_dtype", lambda x: x.dtype)
    model, length = dataclasses.replace(model_config(name), vocab_size=model_config(name).vocab_size or 4096), 256
    built = on_meta(model).to(torch.bfloat16)
    tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped})
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
        built.logits(tokens)
    parts = forward_flops(model, length, vocabulary(model))
    parts["attention_core"] *= 2 * length / (length + 1)  # the counter sees all pairs
    assert length * sum(parts.values()) == pytest.approx(counter.get_total_flops(), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "overrides", "gigaflops", "tolerance"),
    [
        ("deepseek_v3", [], 250, 0.01),
        (
            "llama_3_1_8b",  # made into Llama 3.1 405B
            [
                "hidden_size=16384",
                "num_hidden_layers=126",
                "intermediate_size=53248",
                "attention.num_attention_heads=128",
            ],
            2448,
            0.015,  # the paper does not say whether it counts the head
        ),
    ],
    ids=["deepseek_v3", "llama_3_1_405b"],
)
def test_flops_a_trained_token_are_those_of_arxiv_2505_09343_table_2(
    name: str, overrides: list[str], gigaflops: float, tolerance: float, model_config: ModelOf
) -> None:
    model = model_config(name, *overrides)
    assert training_flops_per_token(model, 4096, vocabulary(model)) == pytest.approx(gigaflops * 1e9, rel=tolerance)


def test_deepseek_moe_16b_trains_4096_tokens_for_74_4_teraflops(model_config: ModelOf) -> None:
    # arXiv 2401.06066, table 3, which counts every pair of positions, not the causal half.
    model = model_config("deepseek_moe_16b")
    parts = forward_flops(model, 4096, vocabulary(model))
    parts["attention_core"] *= 2
    assert 4096 * 3 * sum(parts.values()) == pytest.approx(74.4e12, rel=0.03)


@pytest.mark.parametrize(
    ("name", "layers", "thousands"),
    [
        ("deepseek_v2_lite", 27, 15.6),  # the small models of the DeepSeek-V2 paper, MLA and MHA
        ("deepseek_moe_16b", 27, 110.6),
        ("deepseek_v3", 60, 34.6),  # the large one with MLA
    ],
)
def test_cached_elements_are_those_of_arxiv_2405_04434(
    name: str, layers: int, thousands: float, model_config: ModelOf
) -> None:
    elements = cache_elements_per_token(model_config(name, f"num_hidden_layers={layers}"))
    assert round(elements / 1000, 1) == thousands


def test_the_context_extension_and_mtp_of_deepseek_v3_are_added_on_the_command_line(model_config: ModelOf) -> None:
    model = model_config(
        "deepseek_v3",
        "mtp=depth_1",
        "rope_scaling=yarn",
        "rope_scaling.factor=40",
        "rope_scaling.original_max_position_embeddings=4096",
    )
    assert model.mtp_depth == 1
    # The released weights: 685B on disk, of which 671B are the main model; the 14B of the MTP module (readme of
    # DeepSeek-V3) hold a copy of the embedding and of the head as well.
    mtp = parameter_counts(model, vocabulary(model)).mtp + 2 * vocabulary(model) * model.hidden_size
    assert mtp / 1e9 == pytest.approx(14, abs=0.6)
