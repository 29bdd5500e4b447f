"""Rotary embedding: lengths, distances, and the stretched frequencies against transformers' own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moe_train.config import Llama3RopeConfig, ModelConfig, RopeScalingConfig, YarnConfig
from moe_train.model.rope import rotary_frequencies, rotary_tables, rotate, softmax_scale

CPU = torch.device("cpu")


@pytest.fixture
def model_of(model_config: Callable[..., ModelConfig]) -> Callable[..., ModelConfig]:
    def make(scaling: RopeScalingConfig | None, dim: int = 64, theta: float = 10000.0) -> ModelConfig:
        config = model_config("nano", "attention=gqa_4x32", f"attention.head_dim={dim}", f"rope_theta={theta}")
        return dataclasses.replace(config, rope_scaling=scaling)

    return make


def theirs(dim: int, theta: float, parameters: dict[str, object]) -> tuple[torch.Tensor, float]:
    config = LlamaConfig(
        head_dim=dim,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": theta, **parameters},
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[str(parameters["rope_type"])](config, CPU)
    return frequencies, factor


def test_rotation_keeps_lengths_and_makes_products_depend_on_distance_only() -> None:
    cos, sin = rotary_tables(torch.arange(20), 10000.0 ** (-torch.arange(0, 8, 2) / 8))
    q, k = torch.randn(2, 8)
    turned_q = rotate(q.expand(20, 8), cos, sin)
    turned_k = rotate(k.expand(20, 8), cos, sin)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(20))
    torch.testing.assert_close(turned_q[9] @ turned_k[4], turned_q[15] @ turned_k[10], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("factor", [1.0, 4.0, 40.0])
def test_yarn_frequencies_and_temperature_are_those_of_transformers(
    dim: int, factor: float, model_of: Callable[..., ModelConfig]
) -> None:
    scaling = YarnConfig("yarn", factor, 4096, 32.0, 1.0, 1.0)
    expected, attention_factor = theirs(
        dim,
        10000.0,
        {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
    )
    model = model_of(scaling, dim)
    torch.testing.assert_close(rotary_frequencies(model, CPU), expected, rtol=1e-6, atol=0)
    # Theirs multiplies queries and keys, ours their product.
    assert softmax_scale(model, dim) == pytest.approx(attention_factor**2 / math.sqrt(dim), rel=1e-9)


def test_llama_3_frequencies_are_those_of_transformers(model_of: Callable[..., ModelConfig]) -> None:
    scaling = Llama3RopeConfig("llama3", 8.0, 8192, 1.0, 4.0)
    expected, attention_factor = theirs(
        128,
        500000.0,
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    )
    model = model_of(scaling, 128, 500000.0)
    torch.testing.assert_close(rotary_frequencies(model, CPU), expected, rtol=1e-6, atol=0)
    assert softmax_scale(model, 128) == pytest.approx(1 / math.sqrt(128))
    assert attention_factor == 1


def test_a_factor_of_one_changes_nothing(model_of: Callable[..., ModelConfig]) -> None:
    plain = rotary_frequencies(model_of(None), CPU)
    for scaling in (YarnConfig("yarn", 1.0, 256, 32.0, 1.0, 1.0), Llama3RopeConfig("llama3", 1.0, 256, 1.0, 4.0)):
        torch.testing.assert_close(rotary_frequencies(model_of(scaling), CPU), plain, rtol=1e-6, atol=0)
    assert softmax_scale(model_of(scaling), 64) == pytest.approx(1 / 8)
